"""The checks of the way to the coordinator, each by its bad case: against a server and a proxy on loopback."""

import base64
import contextlib
import datetime as dt
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from client.doctor import network
from client.doctor.findings import Check, Finding, Status, look
from client.doctor.network import Proxy, Way
from client.joining import Pinned
from common.certificates import authority_certificate, new_key, server_certificate
from common.crypto import SigningKey
from common.errors import ConfigError, ExitCode
from tests.coordinator_home import free_port
from tests.e2e.recording_proxy import recording_proxy

NOW = dt.datetime.now(dt.UTC)
AUTHORITY_KEY = new_key()
AUTHORITY = authority_certificate(AUTHORITY_KEY, "ours", NOW)
OTHER = authority_certificate(new_key(), "another", NOW)


PINNED = Pinned("fed.example.org", 9092, AUTHORITY, SigningKey.generate().verify_key, "st-mary", "test", "none")


def found(check: Check) -> Finding:
    return look("check", check)


@contextmanager
def serving(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):  # the listener is closed
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        talk(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@contextmanager
def server(folder: Path, *, answer: str | None = None) -> Iterator[Way]:
    key = new_key()
    (folder / "server.key").write_bytes(key)
    (folder / "server.pem").write_bytes(server_certificate(AUTHORITY_KEY, AUTHORITY, key, "fed.example.org", NOW))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    said = answer or f"HTTP/1.1 200 OK\r\nDate: {formatdate(usegmt=True)}\r\nContent-Length: 0\r\n\r\n"

    def talk(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as line:
            if line.recv(4096):
                line.sendall(said.encode())

    with serving(talk) as port:
        yield Way("127.0.0.1", port)


def test_all_is_well(tmp_path: Path) -> None:
    with server(tmp_path) as way, recording_proxy() as proxy:
        der = ssl.PEM_cert_to_DER_cert((tmp_path / "server.pem").read_text())
        for one in (way, Way(way.host, way.port, Proxy("127.0.0.1", proxy.port))):
            tls = network.check_tls(one, AUTHORITY)
            assert network.fingerprint(der) in tls.said
            checks = (network.check_dns(one), network.check_proxy(one), network.check_health(one, AUTHORITY))
            assert {finding.status for finding in (tls, *checks, network.check_clock(one, AUTHORITY))} == {Status.PASS}
        assert {line.split(" HTTP/")[0] for line in proxy.asked} == {f"CONNECT 127.0.0.1:{way.port}"}


def test_a_name_that_does_not_resolve() -> None:
    def unknown(*_: object, **__: object) -> list:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    finding = found(lambda: network.check_dns(Way("fed.example.org", 9092), unknown))
    assert (finding.status, finding.exit_code) == (Status.FAIL, ExitCode.FEDERATION)
    assert "fed.example.org" in finding.said
    assert "not known" in finding.said


def test_a_resolver_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "TIMEOUT_S", 0.1)
    hang = threading.Event()
    finding = found(lambda: network.check_dns(Way("fed.example.org", 9092), lambda *_, **__: [("", hang.wait())]))
    assert finding.exit_code is ExitCode.FEDERATION
    assert "No answer in" in finding.said
    hang.set()


def test_a_server_that_sends_a_byte_now_and_then_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "TIMEOUT_S", 0.5)

    def drip(connection: socket.socket) -> None:
        for _ in range(20):
            connection.sendall(b"H")
            time.sleep(0.1)

    with serving(drip) as port:
        started = time.monotonic()
        way = Way("192.0.2.1", 443, Proxy("127.0.0.1", port))
        assert found(lambda: network.check_proxy(way)).exit_code is ExitCode.FEDERATION
        assert time.monotonic() - started < 1.5


def test_nobody_listens() -> None:
    way = Way("127.0.0.1", free_port())
    for check in (network.check_tls, network.check_health, network.check_clock):
        finding = found(lambda check=check: check(way, AUTHORITY))
        assert finding.exit_code is ExitCode.FEDERATION
        assert "refused" in finding.said


def test_a_dead_proxy_and_one_that_does_not_tunnel() -> None:
    dead = Way("127.0.0.1", 443, Proxy("127.0.0.1", free_port()))
    assert "refused" in found(lambda: network.check_proxy(dead)).said
    with recording_proxy() as proxy:  # tunnels to 127.0.0.1 alone
        finding = found(lambda: network.check_proxy(Way("192.0.2.1", 443, Proxy("127.0.0.1", proxy.port))))
    assert finding.exit_code is ExitCode.FEDERATION
    assert "403" in finding.said


def test_a_proxy_that_wants_a_password_and_is_never_told_it_on_the_screen() -> None:
    asked: list[bytes] = []

    def talk(connection: socket.socket) -> None:
        asked.append(connection.recv(4096))
        connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

    with serving(talk) as port:
        way = network.way_to(PINNED, {"https": f"http://mary:se%40cret@127.0.0.1:{port}"})
        finding = found(lambda: network.check_proxy(way))
    assert base64.b64encode(b"mary:se@cret") in asked[0]
    assert "wants a user" in finding.said
    assert "cret" not in finding.line + repr(way)


def test_what_answers_is_no_proxy(tmp_path: Path) -> None:
    with serving(lambda connection: connection.sendall(b"220 mail ESMTP\r\n")) as port:
        finding = found(lambda: network.check_proxy(Way("127.0.0.1", 443, Proxy("127.0.0.1", port))))
        assert "HTTPS_PROXY" in finding.said
        finding = found(lambda: network.check_tls(Way("127.0.0.1", port), AUTHORITY))
        assert "TLS" in finding.said
    assert finding.exit_code is ExitCode.FEDERATION


def test_a_certificate_of_another_authority(tmp_path: Path) -> None:
    with server(tmp_path) as way:
        finding = network.check_tls(way, OTHER)
        assert finding.exit_code is ExitCode.ENROLMENT
        assert "fedmedgan ours" in finding.said  # who issued it: a proxy is known by that
        assert "extra_ca" in finding.fix
        for check in (network.check_health, network.check_clock):
            assert found(lambda check=check: check(way, OTHER)).exit_code is ExitCode.ENROLMENT
        inspected = network.check_tls(way, OTHER, [AUTHORITY])
        assert inspected.status is Status.PASS
        assert "extra_ca" in inspected.said
        assert network.check_tls(way, AUTHORITY, [OTHER]).said.startswith("by the pinned authority")


def test_a_certificate_that_is_over_or_of_another_host(tmp_path: Path) -> None:
    with server(tmp_path) as way:
        wrong = network.check_tls(Way("::ffff:127.0.0.1", way.port), AUTHORITY)  # an address that it does not name
        assert wrong.exit_code is ExitCode.ENROLMENT
        assert "mismatch" in wrong.said
    key, long_ago = new_key(), NOW - dt.timedelta(days=500)
    authority = authority_certificate(key, "old", long_ago)
    (tmp_path / "s.key").write_bytes(new_key())
    old = server_certificate(key, authority, (tmp_path / "s.key").read_bytes(), "127.0.0.1", long_ago)
    (tmp_path / "s.pem").write_bytes(old)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "s.pem", tmp_path / "s.key")
    with serving(lambda line: context.wrap_socket(line, server_side=True).close()) as port:
        finding = network.check_tls(Way("127.0.0.1", port), authority)
    assert finding.exit_code is ExitCode.ENROLMENT
    assert "expired" in finding.said


def test_a_server_that_is_another(tmp_path: Path) -> None:
    with server(tmp_path, answer="HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") as way:
        assert "404" in network.check_health(way, AUTHORITY).said
        assert network.check_clock(way, AUTHORITY).status is Status.WARN  # no date
    with server(tmp_path, answer="220 mail\r\n") as way:
        assert found(lambda: network.check_health(way, AUTHORITY)).exit_code is ExitCode.FEDERATION


@pytest.mark.parametrize(
    ("ahead_s", "status"),
    [
        (0, Status.PASS),
        (3.9, Status.WARN),
        (7, Status.FAIL),
        (-30, Status.PASS),
        (-200, Status.WARN),
        (-302, Status.FAIL),
    ],
)
def test_a_clock_that_is_wrong(tmp_path: Path, ahead_s: float, status: Status) -> None:
    date = 1_800_000_000
    answer = f"HTTP/1.1 200 OK\r\nDate: {formatdate(date, usegmt=True)}\r\nContent-Length: 0\r\n\r\n"
    with server(tmp_path, answer=answer) as way:
        finding = network.check_clock(way, AUTHORITY, lambda: date + 0.5 + ahead_s)
    assert finding.status is status
    if status is Status.FAIL:
        assert finding.exit_code is ExitCode.FEDERATION
        assert ("ahead" if ahead_s > 0 else "behind") in finding.said


def test_the_way_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.way_to(PINNED, {}).proxy is None
    assert network.way_to(PINNED, {"http": "http://proxy:3128"}).proxy is None
    for proxies in (
        {"https": "http://proxy:3128"},
        {"all": "proxy:3128"},
        {"https": "http://proxy:3128", "no": "org.uk"},
    ):
        assert network.way_to(PINNED, proxies).proxy == Proxy("proxy", 3128)
    for exempt in ("*", "fed.example.org", "example.org", "other, .example.org"):
        assert network.way_to(PINNED, {"https": "http://proxy:3128", "no": exempt}).proxy is None
    assert network.way_to(PINNED, {"https": "http://proxy:3128", "no": "d.example.org"}).proxy is not None
    for name in ("https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert network.way_to(PINNED).proxy == Proxy("proxy", 3128)


@pytest.mark.parametrize("url", ["socks5://proxy:1080", "https://proxy:443", "http://", "http://proxy:port"])
def test_a_proxy_that_cannot_be_used(url: str) -> None:
    with pytest.raises(ConfigError, match="HTTPS_PROXY"):
        network.way_to(PINNED, {"https": url})
