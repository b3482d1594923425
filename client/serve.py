"""The agent behind its Unix socket: one request at a time, sizes bounded, exceptions kept inside."""

import logging
import select
import socket
import time
from pathlib import Path
from threading import Event

from client.agent import Site, answer
from client.channel import pack_reply, read_frame, unpack_request
from common.errors import RefusalCode, StorageError, WireError
from common.messages import Kind, Reply

LOG = logging.getLogger("fedmedgan.agent")
REQUEST_TIMEOUT_S = 60.0
LONGEST_REQUEST_S = 3600.0
"""What an agent whose `start` was killed may take for the request under way, while the next one waits."""
_WAKE_UP_S, _PROBE_S = 0.2, 2.0


def serve(site: Site, path: Path, stop: Event, wait_s: float = 0.0) -> None:
    """Answer requests on a Unix socket until `stop` is set.

    Args:
        site: An open site.
        path: The socket; made with mode 0660, removed at the end. One that nobody answers on is replaced.
        stop: Ends the loop within a fraction of a second, after the request under way.
        wait_s: How long to wait for another agent that answers there and ends.

    Raises:
        StorageError: Something else than a socket stands there, another agent answers on it, or it cannot be made.
    """
    deadline = time.monotonic() + wait_s
    while not _is_free(path):
        if time.monotonic() > deadline:
            raise StorageError(f"An agent answers on {path} already. Stop it, or choose another path.")
        LOG.warning("an agent answers on %s; this one waits for its end", path)
        if stop.wait(_PROBE_S):
            return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(str(path))
        except OSError as error:
            raise StorageError(f"Could not make the socket {path}: {error.strerror}. Choose another path.") from error
        path.chmod(0o660)
        listener.listen(16)
        try:
            while not stop.is_set():
                if not select.select([listener], [], [], _WAKE_UP_S)[0]:
                    continue
                try:
                    connection, _ = listener.accept()
                except OSError as error:  # the peer went away before it was taken in
                    LOG.warning("a connection was lost: %s", error)
                    continue
                with connection:
                    _answer_one(site, connection)
        finally:
            path.unlink(missing_ok=True)


def _is_free(path: Path) -> bool:
    """Tell whether no agent answers on a path; remove the socket that a killed one left, and nothing else."""
    if not path.is_socket():
        if path.exists() or path.is_symlink():
            raise StorageError(
                f"Expected {path} to be free or an old socket; it is something else. Choose another path."
            )
        return True
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.settimeout(_WAKE_UP_S)
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return True
        except FileNotFoundError:  # it has just ended
            return True
        except (BlockingIOError, TimeoutError):  # it is at work, and its queue is full
            return False
        except OSError as error:
            raise StorageError(f"Could not try the socket {path}: {error.strerror}. Choose another path.") from error
    return False


def _answer_one(site: Site, connection: socket.socket) -> None:
    connection.settimeout(REQUEST_TIMEOUT_S)
    reply = Reply(Kind.HELLO, "", 0, RefusalCode.INTERNAL)
    try:
        request = unpack_request(read_frame(connection))
        reply = Reply(request.kind, request.run_id, request.round, RefusalCode.INTERNAL)
        reply = answer(site, request)
    except (WireError, OSError) as error:
        LOG.warning("a request does not decode: %s", error)
        reply = Reply(Kind.HELLO, "", 0, RefusalCode.BAD_REQUEST)
    except Exception:  # the process edge: nothing of an exception may travel, and the agent goes on
        LOG.exception("a request failed")
    _send(connection, reply)


def _send(connection: socket.socket, reply: Reply) -> None:
    try:
        connection.settimeout(REQUEST_TIMEOUT_S)
        connection.sendall(pack_reply(reply))
    except OSError as error:
        LOG.warning("a reply was not taken: %s; it is stored, the same request gets it again", error)
