"""DICOMweb against a server that lies, on loopback."""

import gzip
import json
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.pull import web
from client.pull.archive import Instance, Reason, Refused, Series
from client.pull.asked import Row
from client.pull.delivery import Delivery
from client.pull.inbox import Inbox
from client.pull.multipart import boundary_of, save_part
from client.pull.sources import Bounds, WebSource
from client.pull.web import WebArchive
from common.errors import ConfigError, PacsError, StorageError
from tests.client.pull.test_identifiers import HEAD, META, element

ROW = Row(2, accession="CANARY")
SERIES = Series(ROW, "1.2", "1.3", "CT", 1)
FILE = (
    HEAD
    + META
    + b"".join(
        element(tag, b"UI", uid) for tag, uid in ((0x00080018, b"1.4"), (0x0020000D, b"1.2"), (0x0020000E, b"1.3"))
    )
)
Answer = tuple[int, dict[str, str], bytes]
"""Status, headers (an empty one is not sent) and body; Content-Length is the body's unless it is named."""
CHUNKED = {"Content-Type": "application/dicom", "Content-Length": "", "Transfer-Encoding": "chunked"}


def part(content: bytes, *, cut: bool = False) -> Answer:
    body = b"--xyz\r\nContent-Type: application/dicom\r\n\r\n" + content + (b"" if cut else b"\r\n--xyz--\r\n")
    return 200, {"Content-Type": 'multipart/related; type="application/dicom"; boundary=xyz'}, body


def page(*values: dict[str, object]) -> Answer:
    return 200, {"Content-Type": "application/dicom+json"}, json.dumps(values).encode()


def study(uid: str, accession: str = "CANARY") -> dict[str, object]:
    return {"0020000D": {"vr": "UI", "Value": [uid]}, "00080050": {"vr": "SH", "Value": [accession]}}


class Server:
    """Answers by a function of path and query, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answer: Callable[[str, dict[str, list[str]]], Answer] = lambda _path, _query: page()
        self.asked: list[tuple[str, dict[str, str]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                server.asked.append((self.path, dict(self.headers)))
                code, headers, body = server.answer(parts.path, parse_qs(parts.query))
                self.send_response(code)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:
                    pass

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/dicom-web"

    def stop(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@pytest.fixture
def archive(server: Server, tmp_path: Path) -> Iterator[WebArchive]:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("canary-token\n")
    made = WebArchive(
        WebSource(kind="dicomweb", url=server.url, token_file=str(token), timeout_s=3, max_file_bytes=5000)
    )
    yield made
    made.close()


def deliver(archive: WebArchive, folder: Path, uids: tuple[str, ...] = ("1.4",), **bounds: int) -> Delivery:
    inbox = Inbox(folder / "inbox", bytes(32), Bounds(free_bytes=bounds.get("free_bytes", 0)))
    delivery = Delivery(inbox, "1.2", "1.3", uids)
    archive.fetch(SERIES, [Instance(uid) for uid in uids], delivery)
    return delivery


def kept(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in (folder / "inbox").rglob("*") if path.is_file()]


def test_whole_file_with_the_token(archive: WebArchive, server: Server, tmp_path: Path) -> None:
    server.answer = lambda *_: part(FILE)
    assert deliver(archive, tmp_path).missing == frozenset()
    assert kept(tmp_path) == [FILE]
    path, headers = server.asked[0]
    assert path == "/dicom-web/studies/1.2/series/1.3/instances/1.4"
    assert headers["Authorization"] == "Bearer canary-token"
    server.answer = lambda *_: (200, {"Content-Type": "application/dicom"}, FILE)
    assert deliver(archive, tmp_path / "plain").missing == frozenset()


def test_plain_file_in_chunks(archive: WebArchive, server: Server, tmp_path: Path) -> None:
    server.answer = lambda *_: (200, CHUNKED, b"%x\r\n%s\r\n0\r\n\r\n" % (len(FILE), FILE))
    assert deliver(archive, tmp_path).missing == frozenset()
    assert kept(tmp_path) == [FILE]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (part(FILE, cut=True), Reason.CUT),
        ((200, {"Content-Type": "application/dicom", "Content-Length": ""}, FILE), Reason.NOT_SENT),
        ((200, CHUNKED, b"%x\r\n%s\r\n" % (len(FILE), FILE)), Reason.CUT),
        ((200, {"Content-Type": "application/dicom", "Content-Length": "9999"}, FILE), Reason.CUT),
        ((200, {"Content-Type": "text/html"}, b"<html>"), Reason.NOT_SENT),
        ((200, {"Content-Type": "multipart/related"}, b""), Reason.NOT_SENT),
        ((200, {"Content-Type": "multipart/related; boundary=xyz"}, bytes(40_000)), Reason.NOT_SENT),
        ((404, {}, b""), Reason.NOT_SENT),
        ((500, {}, b""), Reason.NOT_SENT),
        ((503, {}, b""), Reason.CUT),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), Reason.QUERY),
    ],
)
def test_answers_that_are_no_file(
    answer: Answer, reason: Reason, archive: WebArchive, server: Server, tmp_path: Path
) -> None:
    server.answer = lambda *_: answer
    with pytest.raises(Refused) as caught:
        deliver(archive, tmp_path)
    assert caught.value.reason is reason
    assert kept(tmp_path) == []
    assert len(server.asked) == 1  # a redirect is not followed: the token stays here


def test_another_instance_and_one_that_is_too_large_are_thrown_away(
    archive: WebArchive, server: Server, tmp_path: Path
) -> None:
    server.answer = lambda path, _: part(FILE + bytes(5000) if path.endswith("1.5") else FILE)
    delivery = deliver(archive, tmp_path, ("1.4", "1.5", "1.6"))
    assert delivery.too_large == {"1.5"}
    assert delivery.missing == {"1.5", "1.6"}
    assert kept(tmp_path) == [FILE]


def test_full_disk(archive: WebArchive, server: Server, tmp_path: Path) -> None:
    server.answer = lambda *_: part(FILE)
    with pytest.raises(StorageError, match="free_bytes"):
        deliver(archive, tmp_path, free_bytes=1 << 60)
    assert kept(tmp_path) == []


def test_service_that_ignores_the_key_gives_nothing(archive: WebArchive, server: Server) -> None:
    server.answer = lambda *_: page(study("1.7", "OTHER"), study("1.8", "ANOTHER"))
    with pytest.raises(Refused) as caught:
        archive.find_studies(ROW)
    assert caught.value.reason is Reason.OTHERS


def test_study_without_series_is_no_answer(archive: WebArchive, server: Server) -> None:
    server.answer = lambda *_: page()
    with pytest.raises(Refused) as caught:
        archive.find_series(ROW, "1.2")
    assert caught.value.reason is Reason.NOT_LISTED


@pytest.mark.parametrize("bad", ["", "../x", "1." * 40])
def test_a_series_without_a_uid_hides_no_other(bad: str, archive: WebArchive, server: Server) -> None:
    """Nor does one without a UID hide another one without."""
    named = (("1.3", "CT"), (bad, "CT"), (bad, "PR"), ("1.4", "CT"))
    server.answer = lambda *_: page(
        *({"0020000E": {"Value": [uid]}, "00080060": {"Value": [kind]}} for uid, kind in named)
    )
    found = archive.find_series(ROW, "1.2")
    assert {(one.uid, one.modality) for one in found} >= {("1.3", "CT"), ("1.4", "CT"), ("", "CT")}
    assert {one.uid for one in found} == {"1.3", "1.4", ""}


def test_pages_are_followed_and_end(archive: WebArchive, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "PAGE", 2)
    instances = [{"00080018": {"Value": [f"1.4.{number}"]}} for number in range(5)]

    def answer(_path: str, query: dict[str, list[str]]) -> Answer:
        begin = int(query["offset"][0])
        return page(*instances[begin : begin + 2])

    server.answer = answer
    assert [one.uid for one in archive.find_instances(SERIES)] == [f"1.4.{number}" for number in range(5)]
    server.answer = lambda *_: page(*instances[:2])  # knows no offset
    assert len(archive.find_instances(SERIES)) == 2


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"{}",
        b"[" * 100_000,
        b"9" * 5000,
        b"\xff",
        b'[{"0020000D": 1}, 2, null, {"0020000D": {"Value": [{}]}}]',
    ],
    ids=lambda body: body[:8].decode("latin-1"),
)
def test_json_that_is_none(body: bytes, archive: WebArchive, server: Server) -> None:
    server.answer = lambda *_: (200, {}, body)
    with pytest.raises(Refused):
        archive.find_studies(ROW)


def test_answers_without_end(archive: WebArchive, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "MAX_JSON", 1000)
    server.answer = lambda *_: page(*(study(f"1.{number}") for number in range(100)))
    with pytest.raises(Refused) as caught:
        archive.find_studies(ROW)
    assert caught.value.reason is Reason.QUERY


@pytest.mark.parametrize(
    ("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("identity, gzip", gzip.compress)]
)
def test_packed_answers_are_refused(
    coding: str, pack: Callable[[bytes], bytes], archive: WebArchive, server: Server, tmp_path: Path
) -> None:
    """Before a byte of them is unpacked, whose number nobody knows."""
    packed = pack(b" " * 2**25)
    server.answer = lambda *_: (200, {"Content-Type": part(b"")[1]["Content-Type"], "Content-Encoding": coding}, packed)
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as query:
            archive.find_studies(ROW)
        with pytest.raises(Refused) as retrieval:
            deliver(archive, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert [caught.value.reason for caught in (query, retrieval)] == [Reason.QUERY, Reason.QUERY]
    assert "packed" in query.value.detail
    assert {headers["Accept-Encoding"] for _, headers in server.asked} == {"identity"}
    assert kept(tmp_path) == []


def test_no_identifier_or_secret_in_messages(archive: WebArchive, server: Server) -> None:
    server.answer = lambda *_: (403, {}, b"")
    with pytest.raises(PacsError) as caught:
        archive.find_studies(ROW)
    assert "canary" not in str(caught.value).lower()
    assert "canary" not in repr(archive).lower()


def test_out_of_reach(server: Server) -> None:
    gone = WebArchive(WebSource(kind="dicomweb", url="http://127.0.0.1:1/x"))
    with pytest.raises(PacsError, match="out of reach: ConnectError") as caught:
        gone.echo()
    assert caught.value.__cause__ is None
    gone.close()
    tls = WebArchive(WebSource(kind="dicomweb", url=server.url.replace("http:", "https:"), timeout_s=2))
    with pytest.raises((PacsError, Refused)):
        tls.find_studies(ROW)
    tls.close()
    with pytest.raises(ConfigError, match="ca of"):
        WebArchive(WebSource(kind="dicomweb", url="https://x/", ca="/none"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=300), st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_cut_is_seen(content: bytes, sizes: list[int]) -> None:
    """However the body is cut into chunks, the content comes out whole; without its end it is refused."""
    if b"\r\n--xyz" in content:
        return
    body = part(content)[2]

    def chunks(whole: bytes) -> Iterator[bytes]:
        at = 0
        while at < len(whole):
            size = sizes[at % len(sizes)]
            yield whole[at : at + size]
            at += size

    out = BytesIO()
    save_part(chunks(body), b"xyz", out, lambda _: None)
    assert out.getvalue() == content
    with pytest.raises(Refused):
        save_part(chunks(body[: -len(b"\r\n--xyz--\r\n")]), b"xyz", BytesIO(), lambda _: None)


def test_boundaries() -> None:
    assert boundary_of({"content-type": 'multipart/related; boundary="a b"; type="application/dicom"'}) == b"a b"
    plain = {"content-type": "application/dicom; transfer-syntax=*"}
    assert boundary_of(plain | {"content-length": "9"}) is None
    with pytest.raises(Refused, match="not-sent"):
        boundary_of(plain)
    for wrong in ("", "multipart/related; boundary=" + "x" * 300, "text/plain; boundary=x"):
        with pytest.raises(Refused):
            boundary_of({"content-type": wrong})
