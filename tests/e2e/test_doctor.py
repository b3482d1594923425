"""`fedmedgan-site doctor` against a coordinator's real link: straight, through proxies, and where TLS is inspected."""

import contextlib
import datetime as dt
import select
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.home import Home
from client.joining import read_node_key
from common.certificates import authority_certificate, new_key, server_certificate
from common.errors import ExitCode
from server.consortium import Consortium, read_settings
from tests.coordinator_home import ROOT, end, enrol, free_port, wait_until_up
from tests.coordinator_home import make_home as make_consortium
from tests.coordinator_home import start as start_link
from tests.e2e.conftest import ENVIRONMENT
from tests.e2e.plain_link import wait_for
from tests.e2e.recording_proxy import recording_proxy
from tests.pinned import pin
from tests.tiny_site import make_home

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(60)]

NETWORK = ("dns", "proxy", "tls", "health", "clock")


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    consortium = make_consortium(tmp_path_factory.mktemp("link") / "home")
    process = start_link(consortium, "server.link")
    try:
        wait_until_up(consortium)
        yield consortium
    finally:
        end(process)


@pytest.fixture
def home(link: Consortium) -> Iterator[Home]:
    with tempfile.TemporaryDirectory() as folder:  # short, for a socket's path
        made = make_home(Path(folder))
        pin(made, read_settings(link).port, link.ca_pem.read_bytes())
        yield made


def environment(proxy_port: int | None) -> dict[str, str]:
    found = {name: value for name, value in ENVIRONMENT.items() if not name.lower().endswith("_proxy")}
    return found | {"PYTHONPATH": str(ROOT)} | ({"HTTPS_PROXY": f"http://127.0.0.1:{proxy_port}"} if proxy_port else {})


def site(command: str, home: Home, proxy_port: int | None = None) -> tuple[int, dict[str, str]]:
    """Return the exit code and the lines by check."""
    arguments = [sys.executable, "-m", "client.entry", command, str(home.folder)]
    run = subprocess.run(
        arguments, env=environment(proxy_port), cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert "Traceback" not in run.stderr, run.stderr
    lines = [line for line in run.stdout.splitlines() if "  " in line]
    return run.returncode, {line.split("  ")[1].split(":")[0]: line for line in lines}


def all_pass(lines: dict[str, str]) -> None:
    assert [lines[name] for name in NETWORK if not lines[name].startswith("PASS")] == []


def test_straight_and_through_a_proxy_that_sees_nobody_but_the_coordinator(link: Consortium, home: Home) -> None:
    code, lines = site("doctor", home)
    assert code == ExitCode.OK, lines
    all_pass(lines)
    assert lines["joined"].startswith("PASS")
    with recording_proxy() as proxy:
        code, lines = site("doctor", home, proxy.port)
    assert code == ExitCode.OK
    all_pass(lines)
    assert "tunnels" in lines["proxy"]
    assert {line.split(" HTTP/")[0] for line in proxy.asked} == {f"CONNECT 127.0.0.1:{read_settings(link).port}"}


@contextmanager
def tinyproxy(folder: Path, connect_port: int) -> Iterator[int]:
    port = free_port()
    lines = [f"Port {port}", "Listen 127.0.0.1", "Timeout 30", f'LogFile "{folder / "proxy.log"}"', "MaxClients 20"]
    (folder / "tinyproxy.conf").write_text("\n".join([*lines, "Allow 127.0.0.1", f"ConnectPort {connect_port}"]) + "\n")
    command = ["tinyproxy", "-d", "-c", str(folder / "tinyproxy.conf")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _listens(port), 10, "tinyproxy")
        yield port
    finally:
        end(process)


@pytest.mark.skipif(shutil.which("tinyproxy") is None, reason="tinyproxy is not installed (apt-get install tinyproxy)")
def test_through_tinyproxy(link: Consortium, home: Home, tmp_path: Path) -> None:
    port = read_settings(link).port
    with tinyproxy(tmp_path, port) as proxy_port:
        code, lines = site("doctor", home, proxy_port)
        assert code == ExitCode.OK, lines
        all_pass(lines)
    with tinyproxy(tmp_path, port + 1) as proxy_port:  # it allows CONNECT to another port alone
        code, lines = site("doctor", home, proxy_port)
    assert code == ExitCode.FEDERATION
    assert "HTTP 403" in lines["proxy"]
    assert "administrator" in lines["proxy"]


@contextmanager
def inspecting_proxy(folder: Path) -> Iterator[int]:
    """Run a proxy that opens TLS, as hospitals' do; `folder`/root.pem is its own authority."""
    now, authority_key, key = dt.datetime.now(dt.UTC), new_key(), new_key()
    root = authority_certificate(authority_key, "hospital proxy", now)
    (folder / "root.pem").write_bytes(root)
    (folder / "key.pem").write_bytes(key)
    (folder / "shown.pem").write_bytes(server_certificate(authority_key, root, key, "127.0.0.1", now))
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ours.load_cert_chain(folder / "shown.pem", folder / "key.pem")
    theirs.check_hostname, theirs.verify_mode = False, ssl.CERT_NONE

    def copy(near: ssl.SSLSocket, far: ssl.SSLSocket) -> None:
        """Copy both ways in one thread: two may not use one TLS connection at a time."""
        ends = {near: far, far: near}
        while True:
            for source in [one for one in ends if one.pending()] or select.select(list(ends), [], [], 30)[0]:
                source.settimeout(0)
                try:
                    content = source.recv(1 << 16)
                except ssl.SSLWantReadError:  # a record without content, such as a session ticket
                    continue
                if not content:
                    return
                ends[source].settimeout(30)
                ends[source].sendall(content)

    def inspect(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            target = connection.recv(4096).split(b" ")[1].decode()  # CONNECT host:port
            host, _, port = target.rpartition(":")
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            with (
                ours.wrap_socket(connection, server_side=True) as near,
                socket.create_connection((host, int(port))) as far,
                theirs.wrap_socket(far) as beyond,
            ):
                copy(near, beyond)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=inspect, args=(listener.accept()[0],), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_where_tls_is_inspected(link: Consortium, home: Home, tmp_path: Path) -> None:
    """Refused and explained, until the site decides to trust the proxy's authority; then the relay connects as well."""
    enrol(link, "st-mary", key=read_node_key(home.folder))
    with inspecting_proxy(tmp_path) as port:
        code, lines = site("doctor", home, port)
        assert code == ExitCode.ENROLMENT
        assert lines["proxy"].startswith("PASS")
        assert "hospital proxy" in lines["tls"]
        assert "extra_ca" in lines["tls"]
        with (home.folder / "site.toml").open("a") as file:
            file.write(f'extra_ca = "{tmp_path / "root.pem"}"\n')
        code, lines = site("doctor", home, port)
        assert code == ExitCode.OK, lines
        all_pass(lines)
        assert "inspects TLS" in lines["tls"]
        assert "its holder reads the link" in lines["extra CA"]
        command = [sys.executable, "-m", "client.entry", "relay", str(home.folder)]
        relay = subprocess.Popen(
            command, env=environment(port), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_for(lambda: site("status", home)[0] == ExitCode.OK, 30, "the relay")
        finally:
            end(relay)


def test_a_certificate_authority_that_is_not_the_pinned_one(link: Consortium, home: Home) -> None:
    other = authority_certificate(new_key(), "lab", dt.datetime.now(dt.UTC))
    pin(home, read_settings(link).port, other)
    code, lines = site("doctor", home)
    assert code == ExitCode.ENROLMENT
    assert lines["tls"].startswith("FAIL")
    assert "phone" in lines["tls"]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
