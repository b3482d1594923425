"""Our storage SCP and its receiver against hostile senders, on loopback."""

import gc
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset
from pynetdicom import AE, build_context
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import P_DATA

from client.pull import storage
from client.pull.association import make_tls
from client.pull.delivery import Delivery, Verdict
from client.pull.dimse import DimseArchive
from client.pull.inbox import Inbox
from client.pull.sources import DimseSource, Source
from client.pull.storage import Receiver, StorageScp
from common.errors import StorageError
from tests.real_pacs import free_port

STUDY, SERIES, ASKED = "1.2.3", "1.2.3.4", "1.2.3.4.5"
CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"

pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning",
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning",
)


class Place:
    """A listening SCP with a delivery that asks for one instance."""

    def __init__(self, folder: Path, **changes: object) -> None:
        values = {
            "kind": "dimse", "host": "127.0.0.1", "port": 1, "aet": "PACS", "our_aet": "FEDMEDGAN", "method": "move",
            "listen": "127.0.0.1", "listen_port": free_port(), "free_bytes": 0, "timeout_s": 3.0, **changes,
        }  # fmt: skip
        source = TypeAdapter[Source](Source).validate_python(values)
        assert isinstance(source, DimseSource)
        self.inbox = Inbox(folder / "inbox", bytes(32), source)
        self.archive = DimseArchive(source, self.inbox)  # sets up where parts are written
        self.receiver = Receiver(source.max_file_bytes, source.timeout_s)
        self.delivery = Delivery(self.inbox, STUDY, SERIES, [ASKED])
        self.receiver.delivery = self.delivery
        self.port = values["listen_port"]
        self.scp = StorageScp(source, self.receiver, make_tls(source, server=True))

    def connect(
        self, calling: str = "PACS", called: str = "FEDMEDGAN", tls: ssl.SSLContext | None = None
    ) -> Association:
        entity = AE(ae_title=calling)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 3
        return entity.associate(
            "127.0.0.1",
            self.port,
            contexts=[build_context(CT, EXPLICIT)],
            ae_title=called,
            tls_args=(tls, "127.0.0.1") if tls else None,
        )

    def send(self, dataset: FileDataset, tls: ssl.SSLContext | None = None) -> int | None:
        association = self.connect(tls=tls)
        try:
            return association.send_c_store(dataset).get("Status")
        finally:
            association.release() if association.is_established else association.abort()

    @property
    def files(self) -> list[Path]:
        return [path for path in self.inbox._folder.rglob("*") if path.is_file()]

    def close(self) -> None:
        self.scp.close()
        self.archive.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()
    gc.collect()


def image(study: str = STUDY, series: str = SERIES, instance: str = ASKED) -> FileDataset:
    dataset = dcmread(str(get_testdata_file("CT_small.dcm")))
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = study, series, instance
    return dataset


def test_only_what_was_asked(place: Place) -> None:
    for other in (image(instance="1.9"), image(study="1.9"), image(series="1.9")):
        assert place.send(other) == 0xA900
    assert place.files == []
    assert place.delivery.refused[Verdict.NOT_ASKED] == 3
    assert place.send(image()) == 0x0000
    assert place.files == [place.inbox.path(ASKED)]
    place.receiver.delivery = None  # between two retrievals
    assert place.send(image()) == 0xA900


def test_only_what_was_asked_also_where_the_announcement_lies(place: Place) -> None:
    """The command says an instance that was asked for, the data set another."""
    lie = image(instance="1.9")
    association = place.connect()
    sent = association.dimse.send_msg

    def send(message: object, context: int) -> None:
        message.AffectedSOPInstanceUID = ASKED  # type: ignore[attr-defined]
        sent(message, context)

    association.dimse.send_msg = send
    assert association.send_c_store(lie).Status == 0xA900
    association.dimse.send_msg = sent
    association.release()
    assert place.files == []


@pytest.mark.parametrize("titles", [("STRANGER", "FEDMEDGAN"), ("PACS", "OTHER")])
def test_only_the_pacs_by_its_title(titles: tuple[str, str], place: Place) -> None:
    assert place.connect(*titles).is_rejected


def test_only_the_pacs_by_its_host(tmp_path: Path) -> None:
    place = Place(tmp_path, sender_hosts=["127.0.0.2"])
    try:
        with socket.create_connection(("127.0.0.1", place.port), timeout=3) as stranger:
            assert stranger.recv(1) == b""  # closed before a byte was read
        assert not place.connect().is_established
    finally:
        place.close()
        gc.collect()


def test_bounded_before_it_is_read_a_pdu_that_says_it_is_huge(place: Place) -> None:
    with socket.create_connection(("127.0.0.1", place.port), timeout=3) as hostile:
        hostile.sendall(struct.pack(">BBL", 1, 0, 0xFFFFFFFF))
        assert hostile.recv(1) == b""


def test_bounded_before_it_is_read_a_file_without_end(tmp_path: Path) -> None:
    place = Place(tmp_path, max_file_bytes=200_000)
    dataset = image()
    dataset.PixelData = bytes(3_000_000)
    seen: list[int] = []
    try:
        watch = threading.Thread(target=lambda: seen.append(place.send(dataset) or -1))
        watch.start()
        watch.join(10)
        assert seen == [-1]  # the connection ended without a status
        assert place.delivery.too_large == {ASKED}
        end = time.monotonic() + 10  # the sender sees the end of the connection before we have tidied up
        while place.files and time.monotonic() < end:
            time.sleep(0.01)
        assert place.files == []
    finally:
        place.close()
        gc.collect()


def test_bounded_before_it_is_read_a_command_without_end(place: Place) -> None:
    association = place.connect()
    piece = P_DATA()
    piece.presentation_data_value_list = [[1, b"\x01" + bytes(60_000)]]
    for _ in range(storage.MAX_MESSAGE // 60_000 + 3):
        association.dul.send_pdu(piece)
    end = threading.Event()
    while association.dul.is_alive() and not end.wait(0.05):
        pass
    assert place.files == []


def test_a_full_disk_stops_the_delivery(tmp_path: Path) -> None:
    place = Place(tmp_path, free_bytes=1 << 60)
    try:
        assert place.send(image()) in (None, 0xA700)
        assert isinstance(place.delivery.stopped, StorageError)
        assert place.files == []
    finally:
        place.close()
        gc.collect()


def test_bytes_that_are_no_message(place: Place) -> None:
    for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(200), struct.pack(">BBL", 1, 0, 20) + bytes(20), b"\x04\0\0\0\0\0"):
        with socket.create_connection(("127.0.0.1", place.port), timeout=4) as hostile:
            hostile.sendall(junk)
            hostile.shutdown(socket.SHUT_WR)
            while hostile.recv(4096):
                pass
    end = time.monotonic() + 5
    while not place.connect().is_established and time.monotonic() < end:  # the last of them is still being ended
        time.sleep(0.1)
    assert place.send(image()) == 0x0000  # it listens still
