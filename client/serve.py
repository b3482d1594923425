"""The agent behind its Unix socket: one request at a time, sizes bounded, exceptions kept inside."""

import logging
import os
import secrets
import select
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from threading import Event

from client.agent import Site, answer
from client.channel import pack_reply, read_frame, unpack_request
from common.errors import RefusalCode, StorageError, WireError
from common.messages import Kind, Reply

LOG = logging.getLogger("fedmedgan.agent")
LOOKED = "somebody looked whether an agent answers here"
REQUEST_TIMEOUT_S = 60.0
"""For a whole request to come, and again for the reply to be taken, however small the pieces."""
LONGEST_REQUEST_S = 3600.0
"""What an agent whose `start` was killed may take for the request under way, while the next one waits."""
_WAKE_UP_S, _PROBE_S = 0.2, 2.0
_NOT_DECODED = Reply(Kind.HELLO, "", 0, RefusalCode.BAD_REQUEST)


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
    with _listening(path) as listener:
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


@contextmanager
def _listening(path: Path) -> Generator[socket.socket]:
    """Yield a socket that listens at `path`, which shows it only once it does: who finds it can ask."""
    beside = _beside(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            try:
                listener.bind(str(beside))
                beside.chmod(0o660)
                listener.listen(16)
                os.link(beside, path)  # unlike a rename it leaves another agent's alone
            finally:
                beside.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"Could not make the socket {path}: {error.strerror}. Choose another path.") from error
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """Return a free name in the same folder, no longer than the path's own: 107 bytes have to hold either."""
    letters = len(os.fsencode(path.name))
    names = (path.with_name(secrets.token_urlsafe(12)[:letters]) for _ in repeat(None))
    return next(one for one in names if one != path and not os.path.lexists(one))


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
    reply = Reply(Kind.HELLO, "", 0, RefusalCode.INTERNAL)
    try:
        frame = read_frame(connection, REQUEST_TIMEOUT_S)
        if not frame:
            return _answer_nothing(connection)
        request = unpack_request(frame)
        reply = Reply(request.kind, request.run_id, request.round, RefusalCode.INTERNAL)
        reply = answer(site, request)
    except (WireError, OSError) as error:
        LOG.warning("a request does not decode: %s", error)
        reply = _NOT_DECODED
    except Exception:  # the process edge: nothing of an exception may travel, and the agent goes on
        LOG.exception("a request failed")
    try:
        _send(connection, reply)
    except OSError as error:
        LOG.warning("a reply was not taken: %s; it is stored, the same request gets it again", error)


def _answer_nothing(connection: socket.socket) -> None:
    """Answer who closed without asking: `doctor`, which reads it, or an agent that waits for this one's end."""
    LOG.info(LOOKED)
    with suppress(OSError):
        _send(connection, _NOT_DECODED)


def _send(connection: socket.socket, reply: Reply) -> None:
    connection.settimeout(REQUEST_TIMEOUT_S)  # of all pieces together
    connection.sendall(pack_reply(reply))
