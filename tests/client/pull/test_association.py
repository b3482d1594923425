"""TLS both ways, on loopback, with certificates of a small authority."""

import gc
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, evt
from pynetdicom.events import Event

from client.pull.archive import Reason, Refused
from client.pull.asked import Row
from client.pull.association import FIND, VERIFICATION, associate, make_tls
from client.pull.dimse import DimseArchive
from client.pull.inbox import Inbox
from client.pull.sources import DimseSource
from client.pull.storage import Receiver
from common.errors import ConfigError, PacsError, StorageError
from tests.client.pull.test_storage import ASKED, Place, image
from tests.real_pacs import free_port

DAY = timedelta(days=1)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning",
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning",
)


def certificates(folder: Path) -> dict[str, object]:
    """Write an authority and one certificate for both ends, as a hospital's own authority would make it."""
    now, authority, key = datetime.now(UTC), *(ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("hospital", "pacs")]

    def certificate(subject: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool) -> bytes:
        host = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        made = (
            x509.CertificateBuilder(names[0], subject, public, x509.random_serial_number(), now - DAY, now + DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(host, critical=False)
            .sign(authority, SHA256())
        )
        return made.public_bytes(Encoding.PEM)

    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    files = {
        "tls_ca": certificate(names[0], authority.public_key(), ca=True),
        "tls_cert": certificate(names[1], key.public_key(), ca=False),
        "tls_key": private,
    }
    for name, content in files.items():
        (folder / name).touch(0o600)
        (folder / name).write_bytes(content)
    return {name: str(folder / name) for name in files}


def source_of(port: int, files: dict[str, object]) -> DimseSource:
    values = {
        "kind": "dimse",
        "host": "127.0.0.1",
        "port": port,
        "aet": "PACS",
        "our_aet": "FEDMEDGAN",
        "timeout_s": 3.0,
    }
    return DimseSource.model_validate({**values, **files})


def echo(source: DimseSource, folder: Path) -> str:
    archive = DimseArchive(source, Inbox(folder / "inbox", bytes(32), source))
    try:
        return archive.echo()
    finally:
        archive.close()
        gc.collect()


def test_only_a_pacs_that_the_authority_vouches_for(tmp_path: Path) -> None:
    files = certificates(tmp_path)
    pacs = AE(ae_title="PACS")
    pacs.add_supported_context(VERIFICATION)
    port = free_port()
    shown = make_tls(source_of(port, files), server=True)
    server = pacs.start_server(("127.0.0.1", port), block=False, ssl_context=shown)
    assert server is not None
    try:
        assert echo(source_of(port, files), tmp_path).startswith("C-ECHO answered")
        other = tmp_path / "other"
        other.mkdir()
        with pytest.raises(PacsError, match="TLS fails"):
            echo(source_of(port, certificates(other)), tmp_path)
        with pytest.raises(PacsError, match="if it speaks TLS, set tls_ca"):
            echo(source_of(port, {}), tmp_path)
    finally:
        server.shutdown()


def test_only_a_sender_that_the_authority_vouches_for(tmp_path: Path) -> None:
    files = certificates(tmp_path)
    place = Place(tmp_path, **files)
    try:
        client = make_tls(source_of(1, files), server=False)
        assert client is not None
        assert place.send(image(), client) == 0x0000
        assert place.inbox.holds(ASKED)
        stranger = ssl.create_default_context(cafile=str(files["tls_ca"]))
        with pytest.raises(RuntimeError, match="must be established"):  # TLS 1.3 tells it after the handshake
            place.send(image(), stranger)
    finally:
        place.close()
        gc.collect()


def test_files_that_do_not_load(tmp_path: Path) -> None:
    files = certificates(tmp_path)
    with pytest.raises(ConfigError, match="do not load"):
        make_tls(source_of(1, {"tls_ca": "/none"}), server=False)
    (tmp_path / "tls_key").chmod(0o644)
    with pytest.raises(StorageError, match="mode 600"):
        make_tls(source_of(1, files), server=False)


PACS_ANSWERS = 10


class Woken(threading.Event):
    """The checkpoint of pynetdicom's reactor, which gets the processor only when the test gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.passed, self.given, self.came_back = (threading.Event() for _ in range(3))
        self.set()

    def wait(self, timeout: float | None = None) -> bool:
        if self.given.is_set():
            self.came_back.set()
        else:
            super().wait(timeout)
            self.passed.set()
            self.given.wait(20)
            return True
        return super().wait(timeout)


def answering(event: Event) -> Iterator[tuple[int, Dataset]]:
    for number in range(PACS_ANSWERS):
        found = Dataset()
        found.QueryRetrieveLevel, found.StudyInstanceUID = "STUDY", f"1.2.{number}"
        yield 0xFF00, found


@pytest.mark.parametrize(
    ("status", "reason"),
    [(0x0000, None), (0xA700, Reason.QUERY), (0xC000, Reason.QUERY), (0xFE00, Reason.QUERY), (None, Reason.CUT)],
)
def test_answers_are_all_only_after_success(status: int | None, reason: Reason | None, tmp_path: Path) -> None:
    """None: the association ends without a final status."""

    def ending(event: Event) -> Iterator[tuple[int, Dataset | None]]:
        yield from answering(event)
        if status is None:
            event.assoc.abort()
        yield status or 0x0000, None

    pacs, port = AE(ae_title="PACS"), free_port()
    pacs.add_supported_context(FIND)
    server = pacs.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_FIND, ending)])
    assert server is not None
    source = source_of(port, {})
    archive = DimseArchive(source, Inbox(tmp_path / "inbox", bytes(32), source))
    try:
        if reason is None:
            assert len(archive.find_studies(Row(2))) == PACS_ANSWERS
            return
        with pytest.raises(Refused) as caught:
            archive.find_studies(Row(2))
        assert caught.value.reason is reason
    finally:
        archive.close()
        server.shutdown()
        gc.collect()


def test_a_rejection_is_told_even_if_we_look_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PACS has rejected us and closed the connection before we look whether there was one."""
    pacs, port = AE(ae_title="PACS"), free_port()
    pacs.add_supported_context(VERIFICATION)
    pacs.require_called_aet = True
    server = pacs.start_server(("127.0.0.1", port), block=False)
    assert server is not None
    closed = threading.Event()

    def see_it_close(_: Event) -> None:
        closed.set()

    def look_late(_: Event) -> None:
        closed.wait(20)

    source = source_of(port, {"aet": "OTHER"})
    receiver = Receiver(source.max_file_bytes, 3.0)
    handlers = receiver.handlers()
    handlers += [(evt.EVT_CONN_CLOSE, see_it_close), (evt.EVT_REQUESTED, look_late)]
    monkeypatch.setattr(receiver, "handlers", handlers.copy)
    try:
        with pytest.raises(PacsError, match="does not call itself OTHER"):
            associate(source, receiver, None, [build_context(VERIFICATION)])
        assert closed.is_set()
    finally:
        server.shutdown()
        gc.collect()


def test_no_answer_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of the association wakes late, and finds answers where it looks for requests."""
    pacs = AE(ae_title="PACS")
    pacs.add_supported_context(FIND)
    port = free_port()
    server = pacs.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_FIND, answering)])
    assert server is not None
    source = source_of(port, {})
    association = associate(source, Receiver(source.max_file_bytes, 3.0), None, [build_context(FIND)])
    checkpoint = Woken()
    try:
        monkeypatch.setattr(association, "_reactor_checkpoint", checkpoint)
        assert checkpoint.passed.wait(20)
        query = Dataset()
        query.QueryRetrieveLevel, query.StudyInstanceUID = "STUDY", ""
        answers = association.send_c_find(query, FIND)
        statuses = [next(answers)[0].Status]
        end = time.monotonic() + 20
        while not association.dimse.msg_queue.qsize() and time.monotonic() < end:
            time.sleep(0.001)
        checkpoint.given.set()  # now the reactor runs on, past its look whether it is to pause
        assert checkpoint.came_back.wait(20)
        statuses += [status.Status for status, _ in answers]
        assert statuses == [0xFF00] * PACS_ANSWERS + [0x0000]
    finally:
        checkpoint.given.set()
        association.abort()
        server.shutdown()
        gc.collect()
