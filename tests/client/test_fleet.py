"""What the link, or who stands in its place with its certificate, can make the relay read."""

import datetime as dt
import gzip
import socket
import ssl
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.supernode import fleet_http_connection

from client import fleet
from client.fleet import MAX_BODY_BYTES, BoundedClient
from common.certificates import authority_certificate, new_key
from common.errors import ConfigError, ExitCode, FederationError, WireError

OK = b"HTTP/1.1 200 OK\r\n"
PART = bytes(1 << 16)


class Link:
    """Answers every request in the same way, and counts what it could send."""

    def __init__(self, listener: socket.socket, answer: Callable[[], Iterator[bytes]]) -> None:
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.asked: list[bytes] = []
        self.sent = 0
        self._listener, self._answer = listener, answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(20)
                self.asked.append(connection.recv(1 << 16))
                try:
                    for part in self._answer():
                        connection.sendall(part)
                        self.sent += len(part)
                except OSError:
                    pass  # it was given up

    def client(self) -> BoundedClient:
        return BoundedClient.from_server_address(self.address, True, None, [])


@contextmanager
def link(answer: Callable[[], Iterator[bytes]]) -> Generator[Link]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Link(listener, answer)


def declared(status: bytes = OK) -> Iterator[bytes]:
    yield status + b"content-length: %d\r\n\r\n" % (1 << 30)
    for _ in range((1 << 30) // len(PART)):
        yield PART


def undeclared() -> Iterator[bytes]:
    yield OK + b"transfer-encoding: chunked\r\n\r\n"
    for _ in range((1 << 30) // len(PART)):
        yield b"%x\r\n%s\r\n" % (len(PART), PART)


def until_closed() -> Iterator[bytes]:
    yield OK + b"\r\n"
    for _ in range((1 << 30) // len(PART)):
        yield PART


def packed() -> Iterator[bytes]:
    body = gzip.compress(bytes(64 << 20))
    yield OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def failed() -> Iterator[bytes]:
    return declared(b"HTTP/1.1 500 Internal Server Error\r\n")


@pytest.mark.parametrize("answer", [declared, undeclared, until_closed, packed, failed])
def test_bounded_body(answer: Callable[[], Iterator[bytes]]) -> None:
    with link(answer) as found, found.client() as client:
        with pytest.raises(WireError):
            client.PullMessages(PullMessagesRequest())
        assert b"accept-encoding: identity" in found.asked[0].lower()
        assert found.sent < 2 * MAX_BODY_BYTES + (8 << 20)  # what lies in the sockets' buffers


def test_a_full_answer_passes() -> None:
    body = PullObjectResponse(object_found=True, object_content=bytes(MAX_BODY_BYTES - 64)).SerializeToString()

    def answer() -> Iterator[bytes]:
        yield OK + b"content-length: %d\r\n\r\n%s" % (len(body), body)

    with link(answer) as found, found.client() as client:
        assert len(client.PullObject(PullObjectRequest()).object_content) == MAX_BODY_BYTES - 64


def test_goes_nowhere_else() -> None:
    body = PullMessagesResponse().SerializeToString()

    def honest() -> Iterator[bytes]:
        yield OK + b"content-length: %d\r\n\r\n%s" % (len(body), body)

    with link(honest) as other:

        def elsewhere() -> Iterator[bytes]:
            yield (
                b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://%s/\r\ncontent-length: 0\r\n\r\n"
                % other.address.encode()
            )

        with link(elsewhere) as found, found.client() as client, pytest.raises(httpx.HTTPStatusError):
            client.PullMessages(PullMessagesRequest())
        assert other.asked == []


def test_the_line_is_made_with_this_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """`join` gives up at the first answer that is too long: one of the link's is never read whole."""

    def leave(code: int, message: str) -> NoReturn:  # Flower's own ends the process a moment later
        raise SystemExit(code)

    monkeypatch.setattr(fleet_http_connection, "flwr_exit", leave)
    key = ec.generate_private_key(ec.SECP384R1())
    with link(declared) as found:
        opened = fleet_http_connection.http_request_response(found.address, True, None, (key, key.public_key()))
        with pytest.raises(SystemExit), opened:
            pass
        assert found.sent < 2 * MAX_BODY_BYTES
    assert fleet_http_connection.FleetHttpClient is fleet.BoundedClient


def test_cut_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its text Flower's retries tell what passes from what does not (tests/contracts/test_fleet.py)."""

    def nothing() -> Iterator[bytes]:
        yield b""

    def no_way() -> Iterator[bytes]:
        yield b"HTTP/1.1 502 Bad Gateway\r\n\r\n"

    def no_entry() -> Iterator[bytes]:
        yield b"HTTP/1.1 403 Forbidden\r\n\r\n"

    def ask(address: str) -> None:
        with BoundedClient.from_server_address(address, False, None, []) as client:
            client.PullMessages(PullMessagesRequest())

    with link(nothing) as found, pytest.raises(httpx.ConnectError) as cut:
        ask(found.address)
    assert str(cut.value) == "the connection was cut while it was made"
    for answer, kind in ((no_way, httpx.ConnectError), (no_entry, httpx.ProxyError)):
        with link(answer) as proxy:
            monkeypatch.setenv("https_proxy", f"http://{proxy.address}")
            with pytest.raises(kind):
                ask("127.0.0.2:1")


def test_a_wrong_certificate_is_told_at_once(tmp_path: Path) -> None:
    """Not taken for a cut: somebody must do something about it."""
    key = new_key()
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "pem").write_bytes(authority_certificate(key, "others", dt.datetime.now(dt.UTC)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as plain, context.wrap_socket(plain, server_side=True) as listener:
        found = Link(listener, lambda: iter(()))
        with (
            BoundedClient.from_server_address(found.address, False, None, []) as client,
            pytest.raises(httpx.ConnectError, match="certificate verify failed"),
        ):
            client.PullMessages(PullMessagesRequest())


@pytest.mark.parametrize(
    ("code", "todo"),
    [(b"407 No", "HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT"), (b"403 No", "allow CONNECT to 127.0.0.2:1")],
)
def test_a_proxy_that_refuses_is_named_as_what_refuses(monkeypatch: pytest.MonkeyPatch, code: bytes, todo: str) -> None:
    def leave(exit_code: int, message: str) -> NoReturn:  # Flower's own ends the process a moment later
        raise SystemExit(exit_code)

    monkeypatch.setattr(fleet_http_connection, "flwr_exit", leave)
    key = ec.generate_private_key(ec.SECP384R1())
    with link(lambda: iter([b"HTTP/1.1 " + code + b"\r\ncontent-length: 0\r\n\r\n"])) as proxy:
        monkeypatch.setenv("https_proxy", f"http://mary:cret@{proxy.address}")
        authority = authority_certificate(new_key(), "lab", dt.datetime.now(dt.UTC))
        with pytest.raises(FederationError) as refused, fleet.join("127.0.0.2:1", authority, key):
            pass
    said = str(refused.value)
    assert "proxy" in said
    assert todo in said
    assert "fingerprint" not in said
    assert "cret" not in said


@pytest.mark.parametrize("url", ["socks5://mary:cret@127.0.0.1:1", "ftp://mary:cret@127.0.0.1:1", "http://[mary:cret"])
def test_a_proxy_of_another_kind_is_told_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("https_proxy", url)
    with pytest.raises(ConfigError, match="HTTPS_PROXY") as refused:
        BoundedClient.from_server_address("127.0.0.2:1", False, None, [])
    assert "cret" not in str(refused.value)
    assert refused.value.exit_code == ExitCode.CONFIG
