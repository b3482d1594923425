"""Attacks on a running link, by strangers, by an enrolled site, and by other users of the coordinator's machine."""

import json
import os
import random
import resource
import secrets
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient

from client.paths import Home
from common.files import write_atomic
from common.node_keys import node_public_pem
from server.consortium import Consortium, read_settings
from server.control import connect, list_nodes
from server.enrol import renew
from server.link import MAX_CONNECTIONS, PUBLIC_LIMITS
from tests.coordinator_home import (
    ROOT,
    client,
    end,
    enrol,
    environment,
    make_home,
    openssh,
    signed_headers,
    start,
    wait_until_up,
)
from tests.pinned import pin

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(60)]

Link = tuple[Consortium, ec.EllipticCurvePrivateKey, psutil.Process]


def known(consortium: Consortium) -> set[str]:
    with connect(consortium) as control:
        return {node.name for node in list_nodes(control)}


def wait_for(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    consortium = make_home(tmp_path_factory.mktemp("link") / "home")
    key = enrol(consortium, "st-mary")
    process = start(consortium, "server.link")
    try:
        wait_until_up(consortium)
        wait_for(lambda: known(consortium) == {"st-mary"})
        yield consortium, key, psutil.Process(process.pid)
        assert process.poll() is None
    finally:
        end(process)


def raw(consortium: Consortium, admin: bool = False) -> ssl.SSLSocket:
    settings = read_settings(consortium)
    trust = ssl.create_default_context(cafile=str(consortium.ca_pem))
    plain = socket.create_connection(("127.0.0.1", settings.control_port if admin else settings.port), timeout=20)
    return trust.wrap_socket(plain, server_hostname="127.0.0.1")


def head(path: str, headers: dict[str, str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def test_public_port_serves_the_fleet_api_and_health_only(link: Link) -> None:
    consortium, key, _ = link
    paths = [path for _, path in PROTOBUF_REQUEST_TYPES if not path.startswith("/v1/fleet/")]
    paths += ["/v1/fleet/../control/start-run", "//v1/control/start-run", "/v1/responses", "/"]
    token = consortium.control_token.read_text()
    with client(consortium) as http:
        for path in paths:
            headers = signed_headers(key) | {"authorization": f"Bearer {token}"}
            status = http.send(http.build_request("POST", path, headers=headers)).status_code
            assert status == 404, path
        for path in ("/docs", "/openapi.json", "/redoc", "/v1/fleet/pull-messages", "/v1/control/list-runs"):
            assert http.get(path).status_code == 404, path
        assert http.get("/health").status_code == 200


def test_strangers_are_refused_before_their_body(link: Link) -> None:
    consortium, key, _ = link
    stranger = ec.generate_private_key(ec.SECP384R1())
    stolen = signed_headers(key)["flwr-public-key"]
    for headers in (
        {"content-type": "application/x-protobuf"},
        signed_headers(stranger),
        signed_headers(stranger) | {"flwr-public-key": stolen},
        signed_headers(key, age_s=400),
        signed_headers(key, age_s=-30),
        signed_headers(key) | {"flwr-timestamp": "yesterday"},
        signed_headers(key) | {"flwr-signature": "%"},
    ):
        with raw(consortium) as connection:  # says that a body follows, and sends none: the answer comes all the same
            connection.sendall(head("/v1/fleet/push-object", headers | {"content-length": "5000000"}))
            assert connection.recv(4096).startswith(b"HTTP/1.1 401")


def test_a_stranger_cannot_register(link: Link) -> None:
    consortium, key, _ = link
    other = ec.generate_private_key(ec.SECP384R1())
    request = RegisterNodeFleetRequest(public_key=node_public_pem(openssh(other))).SerializeToString()
    with client(consortium) as http:
        assert http.post("/v1/fleet/register-node", content=request, headers=signed_headers(other)).status_code == 401
        assert http.post("/v1/fleet/register-node", content=request, headers=signed_headers(key)).status_code >= 400
    assert known(consortium) == {"st-mary"}


def test_a_site_cannot_ask_in_another_name(link: Link) -> None:
    consortium, key, _ = link
    request = PullMessagesRequest(node=Node(node_id=12345)).SerializeToString()
    with client(consortium) as http:
        assert http.post("/v1/fleet/pull-messages", content=request, headers=signed_headers(key)).status_code == 401


def test_a_gigabyte_is_refused_early(link: Link) -> None:
    consortium, key, process = link
    before = process.memory_info().rss
    for headers in ({"content-length": str(1 << 30)}, {"transfer-encoding": "chunked"}):
        sent, answer = 0, b""
        with raw(consortium) as connection:
            connection.sendall(head("/v1/fleet/push-object", signed_headers(key) | headers))
            part = (b"100000\r\n" if "transfer-encoding" in headers else b"") + bytes(1 << 20) + b"\r\n"
            try:
                while sent < 1 << 30:
                    connection.settimeout(0.01)
                    try:
                        answer = connection.recv(4096)
                        break
                    except TimeoutError:
                        connection.settimeout(10)
                    connection.sendall(part)
                    sent += len(part)
            except OSError:  # the link closed while we still sent: that is a refusal, too
                answer = answer or b"HTTP/1.1 413"
        assert answer.startswith(b"HTTP/1.1 413")
        assert sent < 4 * PUBLIC_LIMITS.of("/v1/fleet/push-object")
    assert process.memory_info().rss - before < 64 << 20


def test_a_list_of_thousands_of_parts_is_refused(link: Link) -> None:
    """The link's database would take it in for minutes, and nothing else."""
    consortium, key, _ = link
    tree = ObjectTree(object_id="0" * 64, children=[ObjectTree(object_id=f"{number:064x}") for number in range(2000)])
    request = PushMessagesRequest(message_object_trees=[tree]).SerializeToString()
    with client(consortium) as http:
        assert http.post("/v1/fleet/push-messages", content=request, headers=signed_headers(key)).status_code == 413


def test_silent_connections_of_a_stranger_shut_nobody_out(link: Link) -> None:
    consortium, _, _ = link
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS + 20):
            stack.enter_context(raw(consortium))
        with client(consortium) as http:
            assert http.get("/health").status_code == 200


def test_random_requests_change_nothing(link: Link) -> None:
    consortium, key, _ = link
    chance = random.Random(7)
    paths = [path for _, path in PROTOBUF_REQUEST_TYPES]
    for index in range(100):
        body = chance.randbytes(chance.randrange(2000))
        with client(consortium, admin=index % 2 == 1) as http:
            headers = signed_headers(key) if index % 4 < 2 else {}
            status = http.post(chance.choice(paths), content=body, headers=headers).status_code
            assert 400 <= status < 500
    for admin in (False, True):
        for _ in range(10):
            settings = read_settings(consortium)
            port = settings.control_port if admin else settings.port
            with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
                plain.sendall(chance.randbytes(500))
            with raw(consortium, admin) as connection:
                connection.sendall(chance.randbytes(500) + b"\r\n\r\n")
        with client(consortium, admin) as http:
            assert http.get("/health").status_code == 200


def test_admin_port_without_the_token(link: Link) -> None:
    consortium, key, _ = link
    token = consortium.control_token.read_text()
    wrong = ["", token, f"Bearer {secrets.token_hex(32)}", f"Bearer {token}0", f"Basic {token}", "Bearer \u00e9"]
    with client(consortium, admin=True) as http:
        for path in (path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/control/")):
            assert http.post(path, headers=signed_headers(key)).status_code == 401, path
        for header in wrong:
            headers = [(b"authorization", header.encode())]
            assert http.post("/v1/control/list-runs", headers=headers).status_code == 401
        for path in ("/docs", "/openapi.json", "/v1/responses"):
            assert http.get(path).status_code == 404
        assert http.post("/v1/fleet/pull-messages", headers=signed_headers(key)).status_code == 404


def test_a_run_cannot_be_taken_without_the_secret(link: Link) -> None:
    consortium, _, _ = link
    address = f"127.0.0.1:{read_settings(consortium).control_port}"
    version = RuntimeVersionHttpInterceptor(component_name="thief")
    wrong = SuperExecAuthHttpInterceptor(
        master_secret=secrets.token_bytes(32), protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
    )
    os.environ["NO_PROXY"] = "127.0.0.1"
    for interceptors in ([version], [version, wrong]):
        with (
            RuntimeHttpClient.from_server_address(
                server_address=address,
                insecure=False,
                root_certificates=consortium.ca_pem.read_bytes(),
                interceptors=interceptors,
            ) as thief,
            pytest.raises(httpx.HTTPStatusError) as refused,
        ):
            thief.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
        assert refused.value.response.status_code == 401


def test_sites_come_and_go_and_survive_a_kill(tmp_path) -> None:
    consortium = make_home(tmp_path / "home")
    keys = {name: enrol(consortium, name) for name in ("st-mary", "st-john")}

    def status(name: str) -> int:
        request = ActivateNodeRequest(public_key=node_public_pem(openssh(keys[name])), heartbeat_interval=30)
        with client(consortium) as http:
            body = request.SerializeToString()
            return http.post("/v1/fleet/activate-node", content=body, headers=signed_headers(keys[name])).status_code

    process = start(consortium, "server.link")
    try:
        wait_until_up(consortium)
        wait_for(lambda: known(consortium) == {"st-mary", "st-john"})
        assert (status("st-mary"), status("st-john")) == (200, 200)
        enrol(consortium, "st-john", revoked=True, key=keys["st-john"])
        wait_for(lambda: known(consortium) == {"st-mary"})
        assert status("st-john") == 401
        process.kill()
        process.wait()
        (consortium.sites / "st-mary.json").chmod(0o600)
        process = start(consortium, "server.link")
        wait_until_up(consortium)
        assert status("st-mary") in (200, 412)  # known at once; 412: it was online when the link died
        enrol(consortium, "st-john", key=keys["st-john"])  # a key that was put out does not come back
        enrol(consortium, "st-luke")
        wait_for(lambda: known(consortium) == {"st-mary", "st-luke"})
        assert status("st-john") == 401
        keys["st-john"] = enrol(consortium, "st-john")
        wait_for(lambda: known(consortium) == {"st-mary", "st-luke", "st-john"})
        assert status("st-john") == 200
        assert consortium.folder.joinpath("link.db").stat().st_mode & 0o077 == 0
    finally:
        end(process)


def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path) -> None:
    consortium = make_home(tmp_path / "home")
    address = ("127.0.0.1", read_settings(consortium).port)
    process = start(consortium, "server.link")
    try:
        wait_until_up(consortium)
        pinned, before = client(consortium), ssl.get_server_certificate(address)
        renew(consortium, datetime.now(UTC), authority=True)
        wait_for(lambda: ssl.get_server_certificate(address) != before)
        with pinned as http:  # what sites pinned before goes on to hold
            assert http.get("/health").status_code == 200
    finally:
        end(process)


@pytest.mark.timeout(180)
def test_a_running_site_reconnects_after_the_authority_was_renewed(tmp_path) -> None:
    """Its relay runs through it all: nothing of its home is replaced, and nobody starts it anew."""
    consortium, home = make_home(tmp_path / "home"), Home(tmp_path / "site")
    home.node_key.parent.mkdir(parents=True)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    write_atomic(home.node_key, enrol(consortium, "st-mary").private_bytes(*form), 0o600)
    pin(home, read_settings(consortium).port, consortium.ca_pem.read_bytes())
    kept = {path: path.read_bytes() for path in (home.node_key, home.federation)}
    address = ("127.0.0.1", read_settings(consortium).port)

    def contact() -> str:
        return json.loads(home.relay_state.read_text())["contact"] if home.relay_state.exists() else ""

    link, before = start(consortium, "server.link"), ssl.get_server_certificate
    relay = None
    try:
        wait_until_up(consortium)
        wait_for(lambda: known(consortium) == {"st-mary"})
        command = [sys.executable, "-m", "client.entry", "relay", str(home.folder)]
        relay = subprocess.Popen(command, env=environment(consortium), cwd=ROOT)
        wait_for(contact, 60)
        shown = before(address)
        renew(consortium, datetime.now(UTC), authority=True)
        wait_for(lambda: before(address) != shown)
        link.kill()  # every connection is cut
        link.wait()
        link = start(consortium, "server.link")
        wait_until_up(consortium)
        again = datetime.now(UTC).isoformat(timespec="seconds")
        wait_for(lambda: contact() > again, 90)
        assert relay.poll() is None
        assert before(address) != shown
    finally:
        for process in filter(None, (relay, link)):
            end(process)
    assert {path: path.read_bytes() for path in kept} == kept


def test_one_site_whose_bodies_drip_shuts_nobody_out(link: Link) -> None:
    """Forty parts that never arrive: another site's part and all heartbeats pass meanwhile."""
    consortium, key, _ = link
    other = enrol(consortium, "st-john")
    wait_for(lambda: "st-john" in known(consortium))
    with ExitStack() as stack:
        for _ in range(40):
            dripping = stack.enter_context(raw(consortium))
            dripping.sendall(head("/v1/fleet/push-object", signed_headers(key) | {"content-length": "8000000"}) + b"x")
        with client(consortium) as http:
            for asking in (other, key):
                request = ActivateNodeRequest(public_key=node_public_pem(openssh(asking)), heartbeat_interval=30)
                body, headers = request.SerializeToString(), signed_headers(asking)
                answer = http.post("/v1/fleet/activate-node", content=body, headers=headers)
                assert answer.status_code in (200, 412)  # 412: online already
            part = http.post("/v1/fleet/push-object", content=bytes(100_000), headers=signed_headers(other))
            assert 400 <= part.status_code < 500  # it was read: it is no part of anything
    enrol(consortium, "st-john", revoked=True, key=other)
    wait_for(lambda: known(consortium) == {"st-mary"})


@pytest.mark.parametrize("files", [400, 8192])
def test_connections_that_never_begin_tls_keep_nobody_out(tmp_path, files: int) -> None:
    """More of them than the link may have files open, or may hold at all."""
    consortium = make_home(tmp_path / "home")
    process = start(consortium, "server.link")
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (min(files, 300), files))  # long before it has imported all
    log = consortium.logs / "test-server.link.log"
    try:
        wait_until_up(consortium)
        with ExitStack() as silent:
            address = ("127.0.0.1", read_settings(consortium).port)
            for _ in range(600):
                silent.enter_context(socket.create_connection(address, timeout=20))
            for admin in (False, True):
                with client(consortium, admin) as http:
                    assert http.get("/health").status_code == 200
        assert process.poll() is None
        assert f"this process may open {files} files" in log.read_text()
        wait_for(lambda: "cut for room" in log.read_text())
    finally:
        end(process)
