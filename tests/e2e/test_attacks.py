"""Attacks on a federation while a run is under way: each is refused and logged, says nothing, and the run goes on.

One coordinator and two real sites, whose run takes a step after each attack and completes in the end. The agent of
st-mary is held still meanwhile, so that a question of the run is always open. Attacks of strangers on a link without a
run stand in test_link, hostile requests of the coordinator in test_hostile_coordinator.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import random
import re
import secrets
import signal
import socket
import sqlite3
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StopRunRequest, StreamLogsRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from safetensors.numpy import load_file

from client import journal
from client.channel import MAGIC, MAX_BODY_BYTES, connect, pack_request, read_frame, unpack_reply
from client.cli import main as site_main
from client.joining import read_node_key
from client.ledger import read_ledger
from client.paths import Home
from common import wire
from common.config_text import build_config, read_config
from common.crypto import SigningKey, load_key
from common.errors import RefusalCode
from common.files import make_folder, make_own_folder, write_atomic
from common.messages import Kind, Reply, Request
from common.node_keys import node_public_pem
from common.seal import seal_request, sign_reply
from server import control
from server.cli import main as coordinator_main
from server.consortium import Consortium, load_consortium, read_settings
from tests.coordinator_home import ROOT, client, end, enrol, openssh, signed_headers
from tests.e2e.federation import Federation
from tests.e2e.federation import federation as deployed

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what Flower uses
    pytest.mark.xdist_group("attacks"),
]

SITES = ("st-anne", "st-mary")
ROUNDS = 30
LEAKS = ("Traceback", "Error:", "Exception", "site-packages", ".py", str(ROOT))


def call(main: Callable[[list[str]], object], *arguments: object) -> str:
    """Run a command in this process and return what it printed, if it ended well."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0, said.getvalue()
    return said.getvalue()


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 90.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.1)
    return found


@dataclasses.dataclass
class Attacked:
    """What runs, and the attackers' means."""

    made: Federation
    hub: Consortium
    command: subprocess.Popen[str]
    other: ec.EllipticCurvePrivateKey
    """The node key of st-john, who is enrolled, too, and hostile."""

    @property
    def folder(self) -> Path:
        return self.made.folder

    @property
    def run(self) -> Path:
        return self.made.run

    def home(self, name: str) -> Home:
        return Home(self.folder / name)

    def rounds(self) -> list[dict[str, Any]]:
        return self.made.records()

    def hold(self, number: signal.Signals) -> None:
        """Hold st-mary's agent still, or let it go on."""
        self.made.processes(self.folder / "st-mary", "serve")[0].send_signal(number)

    def go_on(self) -> None:
        """Let the run take a step in which st-mary takes part, then hold it again."""
        seen = len(self.rounds())
        self.hold(signal.SIGCONT)
        try:
            wait_for(lambda: any("st-mary" in line["sites"] for line in self.rounds()[seen:]), "another round")
        finally:
            self.hold(signal.SIGSTOP)
        assert self.command.poll() is None, "the run ended too early for the test"

    def question(self) -> Message:
        """Wait for a question of a round that st-mary has not answered, and return its envelope."""

        def unanswered() -> tuple[Any, ...] | None:
            with contextlib.closing(sqlite3.connect(f"file:{self.hub.database}?mode=ro", uri=True)) as database:
                return database.execute(
                    "select message_id, run_id, src_node_id, dst_node_id, group_id, created_at, ttl, message_type "
                    "from message_ins where dst_node_id = ? and message_type = 'train.round' and message_id not in "
                    "(select reply_to_message_id from message_res) order by created_at desc limit 1",
                    (signed(self.node("st-mary")),),
                ).fetchone()

        row = wait_for(unanswered, "a question")
        time.sleep(1)  # an answer that was on its way when the agent was held is here by now
        if unanswered() != row:
            return self.question()
        message_id, run_id, source, target, group, created, ttl, kind = row
        about = Metadata(
            run_id=unsigned(run_id),
            message_id=message_id,
            src_node_id=unsigned(source),
            dst_node_id=unsigned(target),
            reply_to_message_id="",
            group_id=group,
            created_at=created,
            ttl=ttl,
            message_type=kind,
        )
        assert about.src_node_id == SUPERLINK_NODE_ID
        return make_message(about, RecordDict())

    def node(self, name: str) -> int:
        with control.connect(self.hub) as link:
            return next(node.node_id for node in control.list_nodes(link) if node.name == name)

    def online(self, name: str) -> bool:
        with control.connect(self.hub) as link:
            return any(node.online for node in control.list_nodes(link) if node.name == name)

    def known(self) -> set[str]:
        with control.connect(self.hub) as link:
            return {node.name for node in control.list_nodes(link)}

    def logged(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.hub.folder.rglob("*.log")))

    def proposal(self) -> str:
        return build_config(read_config(self.run / "config.toml")).proposal()

    def charged_runs(self) -> set[str]:
        """The runs that stand in the sites' ledgers."""
        homes = [self.home(name) for name in SITES]
        ledgers = [read_ledger(home.ledger, load_key(home.key).verify_key) for home in homes]
        return {entry.request.run_id for ledger in ledgers for entry in ledger.entries}

    def says_nothing(self, *answers: httpx.Response | str | bytes) -> None:
        """Nothing of a machine, a site or an exception stands in what went out."""
        for answer in answers:
            text = f"{answer.headers}{answer.text}" if isinstance(answer, httpx.Response) else str(answer)
            for leak in (*LEAKS, str(self.folder), *SITES):
                assert leak not in text, (leak, text[:500])

    def fleet(self, key: ec.EllipticCurvePrivateKey) -> FleetHttpClient:
        interceptors = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
        address = f"127.0.0.1:{read_settings(self.hub).port}"
        return FleetHttpClient.from_server_address(address, False, self.hub.ca_pem.read_bytes(), interceptors)

    def push(self, key: ec.EllipticCurvePrivateKey, node_id: int, reply: Message) -> None:
        """Send a reply as a node does: its envelope, then its parts."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        node, run_id = Node(node_id=node_id), reply.metadata.run_id
        with no_object_id_recompute(), self.fleet(key) as fleet:
            tree, parts = get_object_tree(reply), get_all_nested_objects(reply)
            envelope = message_to_proto(remove_content_from_message(reply))
            taken = fleet.PushMessages(
                PushMessagesRequest(
                    node=node, messages_list=[envelope], message_object_trees=[tree], clientapp_runtime_list=[0.0]
                )
            )
            for object_id in taken.objects_to_push:
                content = parts[object_id].deflate()
                fleet.PushObject(
                    PushObjectRequest(
                        node=node,
                        run_id=run_id,
                        object_id=object_id,
                        object_content=content,
                        session_id=taken.session_id,
                    )
                )

    def push_parts(self, key: ec.EllipticCurvePrivateKey, node_id: int, reply: Message, content: bytes) -> None:
        """Send the envelope of a reply, and as its only part what it likes."""
        made_up, node = hashlib.sha256(content).hexdigest(), Node(node_id=node_id)
        reply.metadata.__dict__["_message_id"] = made_up
        with self.fleet(key) as fleet:
            envelope = message_to_proto(remove_content_from_message(reply))
            tree = ObjectTree(object_id=made_up)
            taken = fleet.PushMessages(
                PushMessagesRequest(
                    node=node, messages_list=[envelope], message_object_trees=[tree], clientapp_runtime_list=[0.0]
                )
            )
            assert list(taken.objects_to_push) == [made_up]
            stored = fleet.PushObject(
                PushObjectRequest(
                    node=node,
                    run_id=reply.metadata.run_id,
                    object_id=made_up,
                    object_content=content,
                    session_id=taken.session_id,
                )
            )
            assert stored.stored

    def round_refuses(self, code: str, seen: int) -> None:
        """The question that st-mary did not answer itself costs it this round, by a code."""
        wait_for(lambda: any(line["refused"].get("st-mary") == code for line in self.rounds()[seen:]), code)


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def unsigned(number: int) -> int:
    return number % 2**64


@pytest.fixture(scope="module")
def federation() -> Iterator[Attacked]:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    with deployed(sites=SITES) as three:
        three.found()
        three.start_coordinator()
        for name in SITES:
            three.start_site(name)
        command, hub = three.start_run({"federation.rounds": ROUNDS}), load_consortium(three.hub)
        made = Attacked(three, hub, command, ec.generate_private_key(ec.SECP384R1()))
        try:
            wait_for(lambda: len(made.rounds()) >= 2, "the first rounds", 240)
        except AssertionError:
            print(three.said())
            raise
        made.hold(signal.SIGSTOP)
        three.running.callback(lambda: made.hold(signal.SIGCONT))
        enrol(hub, "st-john", key=made.other)
        wait_for(lambda: "st-john" in made.known(), "st-john to be let in")
        yield made


def test_the_public_port_starts_stops_registers_and_tells_nothing(federation: Attacked) -> None:
    """Whoever is enrolled, and even has the coordinator's token, cannot control the run from outside."""
    run_id = federation.question().metadata.run_id
    token = federation.hub.control_token.read_text().strip()
    key = openssh(ec.generate_private_key(ec.SECP384R1()))
    bodies = {
        "/v1/control/start-run": b"",
        "/v1/control/register-node": RegisterNodeRequest(public_key=node_public_pem(key), name="x").SerializeToString(),
        "/v1/control/stop-run": StopRunRequest(run_id=run_id).SerializeToString(),
        "/v1/control/stream-logs": StreamLogsRequest(run_id=run_id).SerializeToString(),
        "/v1/control/list-runs": b"",
    }
    assert bodies.keys() <= {path for _, path in PROTOBUF_REQUEST_TYPES}
    with client(federation.hub) as http:
        for path, body in bodies.items():
            headers = signed_headers(federation.other) | {"authorization": f"Bearer {token}"}
            answer = http.post(path, content=body, headers=headers)
            assert (answer.status_code, answer.text) == (404, "Not Found"), path
            federation.says_nothing(answer)
            assert f"refused 404 '{path}'" in federation.logged()
    assert federation.known() == {*SITES, "st-john"}
    federation.go_on()


def test_a_run_that_waits_is_not_taken_without_the_secret(federation: Attacked) -> None:
    """The executor is held, so that a second run waits to be taken."""
    (executor,) = federation.made.processes(federation.hub.folder, "server.executor")
    executor.suspend()
    try:
        with control.connect(federation.hub) as link:
            config, folder = federation.folder / "run.toml", federation.folder / "second"
            folder.mkdir()
            waiting = control.submit(link, federation.hub.folder, config, folder, resume=False)
            protected = frozenset({"/flwr.proto.Runtime/AcquireTask"})
            version = RuntimeVersionHttpInterceptor(component_name="thief")
            wrong = SuperExecAuthHttpInterceptor(master_secret=secrets.token_bytes(32), protected_methods=protected)
            address = f"127.0.0.1:{read_settings(federation.hub).control_port}"
            for interceptors in ([version], [version, wrong]):
                with RuntimeHttpClient.from_server_address(
                    server_address=address,
                    insecure=False,
                    root_certificates=federation.hub.ca_pem.read_bytes(),
                    interceptors=interceptors,
                ) as thief:
                    with pytest.raises(httpx.HTTPStatusError) as refused:
                        thief.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
                    assert refused.value.response.status_code == 401
                    federation.says_nothing(refused.value.response)
            path = "/v1/runtime/acquire-task"
            assert path in {path for _, path in PROTOBUF_REQUEST_TYPES}
            with client(federation.hub) as http:
                assert http.post(path, headers=signed_headers(federation.other)).status_code == 404
            assert f"refused 401 '{path}'" in federation.logged()
            assert f"refused 404 '{path}'" in federation.logged()
            assert control.read_run(link, federation.hub.folder, waiting).status == "pending"
            control.stop_run(link, waiting)
    finally:
        executor.resume()
    federation.go_on()


def test_nobody_answers_in_another_nodes_name(federation: Attacked) -> None:
    """An enrolled site, with its own node key, answers the question that is open for st-mary."""
    asked, seen = federation.question(), len(federation.rounds())
    mary, john = federation.node("st-mary"), federation.node("st-john")
    made_up = Reply(Kind.TRAIN, "run", 1, None, {"epsilon_spent": 0.0, "epsilon_allowed": 8.0}, {"w": np.ones(3)})
    reply = wire.encode_reply(made_up, asked)
    with pytest.raises(httpx.HTTPStatusError) as refused:  # as st-mary's node: the key is not its
        federation.push(federation.other, mary, reply)
    assert refused.value.response.status_code == 401
    federation.says_nothing(refused.value.response)
    assert "refused 401 '/v1/fleet/push-messages'" in federation.logged()
    # as its own node, with an envelope that names st-mary's: Flower takes it, the coordinator does not
    question = Request(Kind.TRAIN, "run", 1, "")
    sealed = seal_request(SigningKey.generate(), question, time.time() + 60)
    signed_by_another = sign_reply(SigningKey.generate(), sealed, dataclasses.replace(made_up, arrays={}))
    federation.push(federation.other, john, wire.encode_reply(signed_by_another, asked))
    federation.round_refuses("forged-reply", seen)
    federation.go_on()


def test_a_reply_of_an_earlier_round_is_none(federation: Attacked) -> None:
    """Of st-mary itself, signed by it, sent again by a relay that was broken into."""
    asked, seen, home = federation.question(), len(federation.rounds()), federation.home("st-mary")
    stored = max(home.replies.glob("*train*.reply"))
    earlier = unpack_reply(stored.read_bytes().partition(b"\n")[2])
    assert earlier.refusal is None
    request = Request(Kind.TRAIN, earlier.run_id, earlier.round, federation.proposal())
    coordinator, site = load_key(federation.hub.key), load_key(home.key)
    replayed = sign_reply(site, seal_request(coordinator, request, time.time() - 5), earlier)
    federation.push(read_node_key(home.folder), federation.node("st-mary"), wire.encode_reply(replayed, asked))
    federation.round_refuses("forged-reply", seen)
    federation.go_on()


def test_a_reply_with_bytes_left_over_costs_the_site_a_round(federation: Attacked) -> None:
    asked, seen = federation.question(), len(federation.rounds())
    reply = wire.encode_reply(Reply(Kind.TRAIN, "run", 1, arrays={"w": np.ones(3, np.float32)}), asked)
    (record,) = reply.content.array_records.values()
    (body,) = record.values()
    body.data += b"left over"
    key = read_node_key(federation.home("st-mary").folder)
    federation.push(key, federation.node("st-mary"), reply)
    federation.round_refuses("malformed-reply", seen)
    federation.go_on()


def test_parts_that_are_no_message_cost_the_site_a_round(federation: Attacked) -> None:
    """Flower's head is right, its body is not: what puts the parts together must not end the run."""
    asked, seen, home = federation.question(), len(federation.rounds()), federation.home("st-mary")
    reply = wire.encode_reply(Reply(Kind.TRAIN, "run", 1), asked)
    for content in (b"Message  4\x00\xff\xff\xff\xff", b"ArrayRecord  4\x00{{{{"):
        federation.push_parts(read_node_key(home.folder), federation.node("st-mary"), reply, content)
        federation.round_refuses("malformed-reply", seen)
        federation.go_on()
        asked, seen = federation.question(), len(federation.rounds())
        reply = wire.encode_reply(Reply(Kind.TRAIN, "run", 1), asked)


def test_a_node_that_is_not_registered_and_a_wrong_authority(federation: Attacked, tmp_path: Path) -> None:
    stranger = ec.generate_private_key(ec.SECP384R1())
    public = node_public_pem(openssh(stranger))
    with federation.fleet(stranger) as fleet:
        for ask in (
            lambda: fleet.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30)),
            lambda: fleet.PullMessages(PullMessagesRequest(node=Node(node_id=federation.node("st-mary")))),
        ):
            with pytest.raises(httpx.HTTPStatusError) as refused:
                ask()
            assert refused.value.response.status_code == 401
            federation.says_nothing(refused.value.response)
    for path in ("/v1/fleet/activate-node", "/v1/fleet/pull-messages"):
        assert f"refused 401 '{path}'" in federation.logged()
    settings = read_settings(federation.hub)
    call(coordinator_main, "init", tmp_path / "other", "--host", "127.0.0.1", "--name", "other")
    trust = ssl.create_default_context(cafile=str(load_consortium(tmp_path / "other").ca_pem))
    for port in (settings.port, settings.control_port):
        with (
            httpx.Client(verify=trust, trust_env=False) as http,
            pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            http.get(f"https://127.0.0.1:{port}/health")
    federation.go_on()


def test_a_coordinator_without_the_pinned_key(federation: Attacked) -> None:
    """Of another consortium, at the agents' sockets. Through the relay: test_relay."""
    federation.question()
    before, foreign = federation.charged_runs(), SigningKey.generate()
    proposal = federation.proposal()
    home = federation.home("st-anne")
    for request in (
        Request(Kind.HELLO, "theirs", 0, proposal),
        Request(Kind.WARMUP, "theirs", 0, proposal, {"look": "public"}),
        Request(Kind.TRAIN, "theirs", 1, proposal, {"d_steps_per_g_step": 1}),
    ):
        for asked in (request, seal_request(foreign, request, time.time() + 60)):
            reply = connect(home.socket, 60.0)(asked)
            assert (reply.refusal, dict(reply.fields), dict(reply.arrays)) == (RefusalCode.BAD_REQUEST, {}, {})
        assert f"{request.kind} round {request.round} refused (bad-request)" in home.log.read_text()
    assert federation.charged_runs() == before
    federation.go_on()


def send(path: Path, parts: Iterator[bytes]) -> tuple[bytes, int]:
    """Send what comes until the agent has heard enough; return its answer and the bytes that it took."""
    sent = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(60.0)
        connection.connect(str(path))
        try:
            for part in parts:
                connection.sendall(part)
                sent += len(part)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the agent has seen enough; its answer is there to be read
        return read_frame(connection, 60.0), sent


def frame(body_bytes: int, *body: bytes) -> Iterator[bytes]:
    header = json.dumps(
        {"kind": "train", "run": "run-1", "round": 1, "proposal": "{}", "settings": {}, "seal": None}
    ).encode()
    yield MAGIC + len(header).to_bytes(4, "little") + body_bytes.to_bytes(8, "little") + header
    yield from body


def million_arrays() -> Iterator[bytes]:
    listing = (
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"
    )
    yield from frame(8 + len(listing), len(listing).to_bytes(8, "little"), listing)


def test_huge_tiny_and_left_over_at_the_agents_socket(federation: Attacked) -> None:
    federation.question()
    home, before = federation.home("st-anne"), federation.charged_runs()
    (agent,) = federation.made.processes(home.folder, "serve")
    memory, bad = agent.memory_info().rss, Reply(Kind.HELLO, "", 0, RefusalCode.BAD_REQUEST)
    hello = pack_request(Request(Kind.HELLO, "run-1", 0, ""))
    gigabyte = (bytes(1 << 20) for _ in range(1000))
    for parts, most in (
        (frame(10**9, *gigabyte), 4 << 20),
        (frame(MAX_BODY_BYTES + 1), 1 << 10),
        (million_arrays(), 1 << 30),
        (iter([hello[:-2] + b"left over" + hello[-2:]]), 1 << 10),
        (frame(18, bytes([8, 0, 0, 0, 0, 0, 0, 0]), b"{}      ", b"ab"), 1 << 10),
    ):
        answer, sent = send(home.socket, parts)
        assert unpack_reply(answer) == bad
        assert sent <= most
        federation.says_nothing(answer)
    assert agent.memory_info().rss - memory < 256 << 20
    assert home.log.read_text().count("a request does not decode") >= 4
    assert federation.charged_runs() == before
    federation.go_on()


def test_huge_tiny_and_left_over_at_the_public_port(federation: Attacked) -> None:
    """A gigabyte, declared and not, is in test_link; here it meets a run, and as a tree of a million parts."""
    (link,) = federation.made.processes(federation.hub.folder, "server.link")
    memory, node = link.memory_info().rss, Node(node_id=federation.node("st-john"))
    asked = federation.question()
    envelope = message_to_proto(remove_content_from_message(wire.encode_reply(Reply(Kind.TRAIN, "run", 1), asked)))
    tree = ObjectTree(object_id="0" * 64, children=[ObjectTree(object_id=f"{i:064x}") for i in range(10**6)])
    tiny = PushMessagesRequest(node=node, messages_list=[envelope], message_object_trees=[tree]).SerializeToString()
    pull = PullMessagesRequest(node=node).SerializeToString()
    left_over = pull + b"\xff\xff\xff"
    with client(federation.hub) as http:
        for path, body, statuses in (
            ("/v1/fleet/push-messages", tiny, {413}),
            ("/v1/fleet/pull-messages", bytes(64 << 20), {413}),
            ("/v1/fleet/pull-messages", left_over, {400}),
        ):
            try:
                answer = http.post(path, content=body, headers=signed_headers(federation.other))
            except httpx.TransportError:  # closed while we still sent
                assert statuses == {413}
            else:
                assert answer.status_code in statuses, (path, answer.status_code, answer.text[:200])
                federation.says_nothing(answer)
            assert f"refused {min(statuses)} '{path}'" in federation.logged()
    assert link.memory_info().rss - memory < 128 << 20
    federation.go_on()


def test_random_requests_on_every_listener(federation: Attacked) -> None:
    """A hundred each at the public port, the loopback port and the agent's socket, by those who may pass the gate."""
    federation.question()
    chance, before, hub = random.Random(11), federation.charged_runs(), federation.hub
    paths = [path for _, path in PROTOBUF_REQUEST_TYPES]
    token = hub.control_token.read_text().strip()
    for admin in (False, True):
        headers = {"authorization": f"Bearer {token}", "content-type": "application/x-protobuf"} if admin else {}
        prefix = ("/v1/control/", "/v1/runtime/") if admin else ("/v1/fleet/",)
        mine = [path for path in paths if path.startswith(prefix)]
        with client(hub, admin) as http:
            for _ in range(100):
                body = b"\xff" + chance.randbytes(chance.randrange(1500))  # no message begins so
                path = chance.choice(mine)
                answer = http.post(path, content=body, headers=headers or signed_headers(federation.other))
                assert 400 <= answer.status_code < 500, (path, answer.status_code, answer.text)
                federation.says_nothing(answer)
                assert f"refused {answer.status_code} '{path}'" in federation.logged()
    home, honest = federation.home("st-anne"), pack_request(Request(Kind.HELLO, "run-1", 0, ""))
    for number in range(100):
        content = bytearray(honest if number % 2 else chance.randbytes(chance.randrange(1, 1500)))
        for _ in range(3):
            content[chance.randrange(len(content))] = chance.randrange(256)
        answer, _ = send(home.socket, iter([bytes(content)]))
        assert unpack_reply(answer).refusal is not None
        federation.says_nothing(answer)
    assert federation.charged_runs() == before
    federation.go_on()


def test_a_site_takes_part_through_its_own_node_alone(federation: Attacked) -> None:
    """A relay with st-john's node key before st-anne's agent, as it goes on until st-anne is revoked and after."""
    home, anne = federation.home("st-john"), federation.home("st-anne")
    private = federation.other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    make_own_folder(home.folder)
    write_atomic(home.federation, anne.federation.read_bytes(), 0o600)
    make_folder(home.node_key.parent, 0o700)
    write_atomic(home.node_key, private, 0o600)
    relay = federation.made.launch("site", "relay", home.folder, "--socket", anne.socket, log="st-john.log")
    federation.made.running.callback(end, relay, 60)
    wait_for(lambda: federation.online("st-john"), "st-john's node")
    federation.go_on()
    said = federation.folder / "out.log"
    line = r"st-john +left out: its node answers as st-anne: one site, its own node"
    wait_for(lambda: re.search(line, said.read_text()), "the coordinator to say so")
    assert all("st-john" not in record["sites"] for record in federation.rounds())


def test_a_site_that_is_revoked_in_mid_run_is_out(federation: Attacked) -> None:
    federation.question()
    key = read_node_key(federation.home("st-anne").folder)
    call(coordinator_main, "revoke", federation.hub.folder, "st-anne")
    wait_for(lambda: "st-anne" not in federation.known(), "the link to put st-anne out")
    public = node_public_pem(openssh(key))
    with federation.fleet(key) as fleet, pytest.raises(httpx.HTTPStatusError) as refused:
        fleet.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
    assert refused.value.response.status_code == 401
    federation.says_nothing(refused.value.response)
    assert "refused 401 '/v1/fleet/activate-node'" in federation.logged()
    federation.go_on()
    federation.go_on()
    assert set(federation.rounds()[-1]["sites"]) == {"st-mary"}
    assert "st-anne  left out: it was revoked" in (federation.folder / "out.log").read_text()


def test_in_the_end_the_run_completes(federation: Attacked) -> None:
    federation.hold(signal.SIGCONT)
    try:
        assert federation.command.wait(150) == 0, federation.logged()[-4000:]
    finally:
        federation.hold(signal.SIGCONT)
    lines = federation.rounds()
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1))
    generator = load_file(federation.run / "generator.safetensors")
    assert all(np.isfinite(array).all() for array in generator.values())
    for name in SITES:
        home = federation.home(name)
        written = {entry.round: entry.sha256 for entry in journal.entries(home.journal, load_key(home.key).verify_key)}
        received = {line["round"]: line["sites"][name]["sha256"] for line in lines if name in line["sites"]}
        assert received
        assert received.items() <= written.items()
        assert "verified" in call(site_main, "ledger", home.folder)
        call(site_main, "journal", "verify", home.folder)
