"""Receiving by DIMSE: the handler of C-STORE, bounds on what one connection may send, and the SCP for C-MOVE.

pynetdicom reads whatever length a peer announces and queues whatever it sends: bytes are bounded as they are read.
Source: PS3.7 9.1.1 (C-STORE), PS3.4 B.2.3 (its status), PS3.8 9.3 (PDUs).
"""

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from socketserver import BaseServer
from typing import Any, Final, cast, final

from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event, EventHandlerType
from pynetdicom.transport import ThreadedAssociationServer

from client.pull.delivery import Delivery, Verdict
from client.pull.sources import DimseSource
from common.errors import ConfigError, FedmedganError

LOG = logging.getLogger("fedmedgan.pull")

MAX_PDU: Final = 1 << 18
"""Bytes of a PDU that we read; we offer half of it."""
MAX_MESSAGE: Final = 1 << 20
"""Bytes of any message but a C-STORE."""
ACSE_S: Final = 30.0
"""How long a connection may take to say who it is, seconds."""
ROOM_EVERY: Final = 8 << 20
"""Bytes between two looks at the disk while a file comes."""
MAX_ASSOCIATIONS: Final = 4
MAX_WAITING: Final = 16
"""Messages that wait to be handled; more are not read until some are."""

_QUICKACK: Final[int | None] = getattr(socket, "TCP_QUICKACK", None)

SUCCESS: Final = 0x0000
STATUS: Final = {
    Verdict.KEPT: SUCCESS,
    Verdict.NOT_ASKED: 0xA900,
    Verdict.NOT_DICOM: 0xC000,
    Verdict.STOPPED: 0xA700,
}

SYNTAXES: Final = (
    "1.2.840.10008.1.2.1",  # explicit little endian
    "1.2.840.10008.1.2",  # implicit little endian
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.51",  # JPEG extended
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.201",  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K lossless, progressive
    "1.2.840.10008.1.2.4.203",  # HTJ2K
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.1.99",  # deflated
    "1.2.840.10008.1.2.2",  # explicit big endian
)
"""What we take, as it is stored: nothing is decoded here."""


def silence() -> None:
    """Keep pynetdicom from noting what it sees, and make it write what arrives to files."""
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = False
    _config.LOG_RESPONSE_IDENTIFIERS = False
    _config.STORE_RECV_CHUNKED_DATASET = True
    logger = logging.getLogger("pynetdicom")
    logger.propagate = False
    logger.setLevel(logging.CRITICAL + 1)


@final
class Receiver:
    """Takes C-STORE requests for the delivery under way."""

    def __init__(self, max_file_bytes: int, timeout_s: float) -> None:
        """Take the bytes of a file at most, and for how long a connection may say nothing."""
        self._max_file_bytes, self.timeout_s = max_file_bytes, timeout_s
        self.delivery: Delivery | None = None

    def handlers(self) -> list[EventHandlerType]:
        """Return what an association has to call."""
        return [
            (evt.EVT_CONN_OPEN, self._bound),
            (evt.EVT_CONN_CLOSE, self._discard),
            (evt.EVT_C_STORE, self._store),
        ]

    def _store(self, event: Event) -> int:
        part, announced = event.dataset_path, str(cast(C_STORE, event.request).AffectedSOPInstanceUID)
        if self.delivery is None:
            part.unlink(missing_ok=True)
            return STATUS[Verdict.NOT_ASKED]
        verdict = self.delivery.take(part, announced)
        if verdict is Verdict.STOPPED:
            event.assoc.abort()
            event.assoc.dimse.msg_queue.put((None, None))  # else who waits for the end of a C-GET waits `timeout_s`
        return STATUS[verdict]

    def _bound(self, event: Event) -> None:
        """Bound what is read from this connection.

        Guarantees:
            - bounded_before_it_is_read: A PDU or message that is announced as, or grows, too large is not read on; the
              connection ends.
        """
        connection = event.assoc.dul.socket
        if connection is None or connection.socket is None:
            return
        connection.socket.settimeout(self.timeout_s)
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a request is two small PDUs
        cast(Any, connection).recv = _Bounded(event.assoc, connection.recv, self).read

    def is_too_large(self, message: Any, read: int) -> bool:
        """Return whether a message is too large, given how many bytes of it are read."""
        if not isinstance(message, C_STORE_RQ):
            return read > MAX_MESSAGE
        if read > self._max_file_bytes and self.delivery is not None:
            self.delivery.drop(str(message.command_set.AffectedSOPInstanceUID))
        return read > self._max_file_bytes

    def require_room(self, coming: int) -> None:
        """Look whether the disk holds what is coming, and stop the delivery if not."""
        if self.delivery is None:
            return
        try:
            self.delivery.inbox.require_room(coming)
        except FedmedganError as error:
            self.delivery.stop(error)
            raise OSError from error

    @staticmethod
    def _discard(event: Event) -> None:
        """Close what pynetdicom leaves open as a connection ends, and remove what was not received whole."""
        connection, message = event.assoc.dul.socket, event.assoc.dimse.message
        if connection is not None and connection.socket is not None:
            connection.socket.close()
        file, path = getattr(message, "_data_set_file", None), getattr(message, "_data_set_path", None)
        if file is not None and isinstance(path, Path):
            file.close()
            path.unlink(missing_ok=True)


@final
class _Bounded:
    """Reads one connection within bounds."""

    def __init__(self, assoc: Any, plain: Callable[[int], bytearray], receiver: Receiver) -> None:
        self._assoc, self._plain, self._receiver = assoc, plain, receiver
        self._message: Any = None
        self._read = self._looked = 0

    def read(self, count: int) -> bytearray:
        if count > MAX_PDU:
            raise OSError("a PDU is too long")
        current = self._assoc.dimse.message  # None between two messages
        if current is None or current is not self._message:
            self._message, self._read, self._looked = current, 0, 0
        self._read += count
        if self._receiver.is_too_large(current, self._read):
            raise OSError("a message is too long")
        self._wait()
        if self._read - self._looked > ROOM_EVERY:
            self._looked = self._read
            self._receiver.require_room(self._read)
        self._acknowledge()
        return self._plain(count)

    def _acknowledge(self) -> None:
        """Acknowledge at once: a PACS that sends a message as two small packets waits 40 ms between them for it."""
        plain = self._assoc.dul.socket.socket
        if plain is not None and _QUICKACK is not None:
            plain.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)  # forgotten after each use

    def _wait(self) -> None:
        end = time.monotonic() + self._receiver.timeout_s
        while self._assoc.dimse.msg_queue.qsize() > MAX_WAITING:
            if time.monotonic() > end:
                raise OSError("nobody takes the messages")
            time.sleep(0.01)


@final
class _Server(ThreadedAssociationServer):
    """A server that speaks with the hosts of the PACS only."""

    hosts: frozenset[str] = frozenset()
    seconds: float = 30.0

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        """Accept a connection of the PACS; end any other before a byte of it is read."""
        client, address = cast(socket.socket, self.socket).accept()
        if address[0] not in self.hosts:
            client.close()
            LOG.warning("refused a connection from a host that is not the PACS")
            raise OSError("not the PACS")
        client.settimeout(self.seconds)
        if self.ssl_context is not None:
            client = self.ssl_context.wrap_socket(client, server_side=True)
        return client, address

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """Note that a connection failed, and not what it said."""
        LOG.warning("a connection of the PACS failed")


@final
class StorageScp:
    """Our own storage SCP, to which a C-MOVE makes the PACS send. It listens from construction to `close`.

    Guarantees:
        - only_the_pacs: Connections from other hosts are closed unread; other AE titles are rejected.
        - only_what_was_asked: What was not asked for is refused and not written to the inbox.
    """

    def __init__(self, source: DimseSource, receiver: Receiver, tls: ssl.SSLContext | None) -> None:
        """Listen on the source's address.

        Raises:
            ConfigError: The address is not this machine's, or the port is in use.
        """
        if source.listen is None or source.listen_port is None:
            raise ConfigError("C-MOVE needs listen and listen_port in pacs.toml.")
        entity = AE(ae_title=source.our_aet)
        entity.maximum_pdu_size = MAX_PDU // 2
        entity.maximum_associations = MAX_ASSOCIATIONS
        entity.require_called_aet = True
        entity.require_calling_aet = [source.sender_aet or source.aet]
        entity.network_timeout = entity.dimse_timeout = source.timeout_s
        entity.acse_timeout = min(source.timeout_s, ACSE_S)
        for context in AllStoragePresentationContexts:
            entity.add_supported_context(str(context.abstract_syntax), list(SYNTAXES))
        try:
            address, handlers = (source.listen, source.listen_port), receiver.handlers()
            made = entity.make_server(address, ssl_context=tls, evt_handlers=handlers, server_class=_Server)
        except OSError as error:
            raise ConfigError(
                f"Could not listen on {source.listen}, port {source.listen_port}: {error.strerror}. Name an address of "
                "this machine and a free port as listen and listen_port in pacs.toml."
            ) from None
        self._server = cast(_Server, made)
        self._server.hosts = addresses(source.sender_hosts or (source.host,))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and end what is connected."""
        for association in self._server.active_associations:
            association.abort()
        BaseServer.shutdown(self._server)
        self._server.server_close()
        self._thread.join(5)


def addresses(hosts: Sequence[str]) -> frozenset[str]:
    """Return the addresses of hosts; those of names that do not resolve are left out."""
    found: set[str] = set()
    for host in hosts:
        try:
            found.update(str(entry[4][0]) for entry in socket.getaddrinfo(host, None))
        except OSError:
            LOG.warning("a name in sender_hosts or host does not resolve")
    return frozenset(found)
