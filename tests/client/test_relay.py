"""The relay's loop against a line that is a plain object: what it refuses and fetches, and that only codes leave."""

import hashlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client import fleet, relay, trust
from client.app import make_app
from client.fleet import Fleet, RunEnded
from client.paths import Home
from client.relay_state import State
from common import parts, wire
from common.errors import ConfigError, FederationError, RefusalCode
from common.greeting import hello_settings
from common.messages import Kind, Reply, Request
from tests.pinned import pin

SOCKET = Path("/run/agent.sock")
HELLO = Request(Kind.HELLO, "run-1", 0, "", hello_settings())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 8, 1
    monkeypatch.setattr(relay, "FAILURE_WAIT_S", 0.0)
    monkeypatch.setattr(relay, "AGENT_POLL_S", 0.01)


class Link:
    """A link in memory: hands out the messages given, keeps the replies, then ends the loop as a signal would."""

    def __init__(self, *messages: Message, task_type: str = "flwr-serverapp") -> None:
        self.waiting, self.replies, self.fetched, self.bundles, self.done = list(messages), [], 0, 0, 0
        self.parts: dict[str, bytes] = {}
        self.task_type = task_type
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self.parts |= {name: part.deflate() for name, part in get_all_nested_objects(message).items()}

    def line(self) -> Fleet:
        return Fleet((5, self.receive, self.send, self.run, self.fab, self.pull, lambda *_: None, self.confirm))

    def receive(self) -> tuple[Message, ObjectTree] | None:
        if not self.waiting:
            raise relay._Stopped
        message = self.waiting.pop(0)
        return message, get_object_tree(message)

    def send(self, reply: Message, tree: ObjectTree, worked_s: float) -> tuple[set[str], str]:
        assert worked_s == 0.0
        self.replies.append(reply)
        return set(), ""

    def run(self, run_id: int) -> Run:
        made = Run.create_empty(run_id)
        made.primary_task_type = self.task_type
        return made

    def fab(self, digest: str, run_id: int) -> SimpleNamespace:
        self.bundles += 1
        return SimpleNamespace(content=b"bundle")

    def pull(self, run_id: int, name: str) -> bytes:
        self.fetched += 1
        return self.parts[name]

    def confirm(self, run_id: int, message_id: str) -> None:
        self.done += 1

    def serve(self, app: ClientApp, tmp_path: Path, bundles: frozenset[str] | None = None) -> list[Message]:
        with pytest.raises(relay._Stopped):
            relay.relay(self.line(), app, SOCKET, bundles, State(tmp_path / "state.json"))
        return self.replies


def agent(request: Request) -> Reply:
    return Reply(request.kind, request.run_id, request.round, None, {"site": "st-mary"})


APP = make_app(lambda context: agent)


def hello() -> Message:
    return wire.encode_request(HELLO, 5, 30.0)


def of_type(message_type: str) -> Message:
    return Message(RecordDict(), dst_node_id=5, message_type=message_type, ttl=30.0)


def test_a_request_gets_the_answer_of_the_installed_app(tmp_path: Path) -> None:
    link = Link(hello(), hello())
    replies = link.serve(APP, tmp_path)
    assert [wire.decode_reply(reply).fields["site"] for reply in replies] == ["st-mary", "st-mary"]
    assert (link.done, link.bundles) == (2, 0)


@pytest.mark.parametrize("message_type", ["query.secrets", "train", "evaluate.round", "query.other"])
def test_only_known_requests(tmp_path: Path, message_type: str) -> None:
    link = Link(of_type(message_type), hello())
    refused, answered = link.serve(APP, tmp_path)
    assert (refused.error.code, refused.error.reason) == (fleet.UNKNOWN_REQUEST, "unknown-request")
    assert wire.decode_reply(answered).refusal is None
    assert link.done == 1


@pytest.mark.parametrize("task_type", ["flwr-agentapp", "flwr-model", "flwr-connector", "something new"])
def test_only_federations(tmp_path: Path, task_type: str) -> None:
    link = Link(hello(), task_type=task_type)
    (refused,) = link.serve(APP, tmp_path)
    assert (refused.error.code, refused.error.reason) == (fleet.UNKNOWN_REQUEST, "unknown-task")
    assert link.fetched == 0


def test_only_listed_bundles(tmp_path: Path) -> None:
    link = Link(hello())
    (refused,) = link.serve(APP, tmp_path, frozenset({"0" * 64}))
    assert (refused.error.code, refused.error.reason) == (fleet.INVALID_BUNDLE, "bundle-not-listed")
    assert link.fetched == 0
    digest = hashlib.sha256(b"bundle").hexdigest()
    (answered,) = Link(hello()).serve(APP, tmp_path, frozenset({digest}))
    assert wire.decode_reply(answered).refusal is None


def test_only_codes_leave(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An app that raises a patient's name gets it into the site's log, and nowhere else."""
    app = ClientApp()

    @app.query("hello")
    def crash(message: Message, context: Context) -> Message:
        raise KeyError("DOE^JANE")

    with caplog.at_level(logging.INFO):
        (reply,) = Link(hello()).serve(app, tmp_path)
    assert (reply.error.code, reply.error.reason) == (fleet.FAILED, "internal-error")
    assert b"DOE" not in reply.deflate()
    assert "DOE^JANE" in caplog.text


def test_an_agent_that_is_away_is_waited_for(tmp_path: Path) -> None:
    calls = []

    def away_at_first(request: Request) -> Reply:
        calls.append(request)
        if len(calls) < 3:
            raise ConnectionRefusedError("away")
        return agent(request)

    (reply,) = Link(hello()).serve(make_app(lambda context: away_at_first), tmp_path)
    assert wire.decode_reply(reply).refusal is None
    assert len(calls) == 3


def test_an_agent_that_stays_away_is_a_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(request: Request) -> Reply:
        raise ConnectionRefusedError("away")

    monkeypatch.setattr(relay, "MAX_WAIT_FOR_AGENT_S", 0.05)
    (reply,) = Link(hello()).serve(make_app(lambda context: away), tmp_path)
    assert wire.decode_reply(reply).refusal is RefusalCode.UNREACHABLE


def test_too_much_is_refused_while_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_MESSAGE_BYTES", 10_000)
    arrays = {f"w{i}": Array(np.full(300, i, np.float32)) for i in range(40)}
    big = Message(RecordDict({"arrays": ArrayRecord(arrays)}), dst_node_id=5, message_type="train.round", ttl=30.0)
    link = Link(big, hello())
    refused, answered = link.serve(APP, tmp_path)
    assert (refused.error.code, refused.error.reason) == (fleet.FAILED, "bad-request")
    assert wire.decode_reply(answered).refusal is None
    assert link.done == 1


def test_parts_that_make_no_message_are_refused(tmp_path: Path) -> None:
    message = of_type("query.hello")
    link = Link(message)
    link.parts = dict.fromkeys(link.parts, b"no parts at all")
    (refused,) = link.serve(APP, tmp_path)
    assert refused.error.reason == "bad-request"


def test_a_message_with_neither_content_nor_error_is_refused(tmp_path: Path) -> None:
    link = Link(of_type("query.hello"))
    name = next(name for name, part in link.parts.items() if part.startswith(b"Message "))
    body = link.parts[name].split(b"\0", 1)[1]
    link.parts[name] = f"Message  {len(body)}".encode() + b"\0" + body
    (refused,) = link.serve(APP, tmp_path)
    assert refused.error.reason == "bad-request"


def test_a_record_is_no_message(tmp_path: Path) -> None:
    link = Link(of_type("query.hello"))
    record = RecordDict({"header": ConfigRecord({"a": 1})})
    link.parts |= {name: part.deflate() for name, part in get_all_nested_objects(record).items()}
    tree = get_object_tree(record)
    envelope, _ = link.receive()
    with pytest.raises(fleet.WireError, match="with content"):
        link.line().content(envelope, tree)


def test_failures_end_the_relay_only_when_they_go_on(tmp_path: Path) -> None:
    link, left = Link(hello()), [relay.MAX_FAILURES - 1]
    receive = link.receive

    def flaky() -> tuple[Message, ObjectTree] | None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("500")
        return receive()

    link.receive = flaky
    assert len(link.serve(APP, tmp_path)) == 1
    left[0] = 10**6
    with pytest.raises(FederationError, match="in a row"):
        relay.relay(link.line(), APP, SOCKET, None, State(tmp_path / "state.json"))


def test_a_lost_reply_costs_its_question_never_the_queue(tmp_path: Path) -> None:
    """A reply that the link does not take, since its time is over or the line broke, is given up; the next one goes."""
    link = Link(hello(), hello(), hello())
    send, lost = link.send, []

    def lose_two(reply: Message, tree: ObjectTree, worked_s: float) -> tuple[set[str], str]:
        if len(lost) < 2:
            lost.append(reply)
            raise httpx.ReadError("reset")
        return send(reply, tree, worked_s)

    link.send = lose_two
    (reply,) = link.serve(APP, tmp_path)
    assert len(lost) == 2
    assert wire.decode_reply(reply).fields["site"] == "st-mary"


def test_a_run_that_has_ended_is_no_failure(tmp_path: Path) -> None:
    link, times = Link(hello()), [3 * relay.MAX_FAILURES]
    receive = link.receive

    def over() -> tuple[Message, ObjectTree] | None:
        if times[0]:
            times[0] -= 1
            raise RunEnded
        return receive()

    link.receive = over
    assert len(link.serve(APP, tmp_path)) == 1


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home with what a relay needs; this process's handlers of signals and of failed threads come back."""
    home = Home(tmp_path)
    home.node_key.parent.mkdir()
    pin(home)
    monkeypatch.setattr(relay, "read_node_key", lambda folder: None)
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    yield home
    for number, handler in kept.items():
        signal.signal(number, handler)


def answers_with(failure: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the link connect, and then do this at the first question."""

    @contextmanager
    def join(*_: object) -> Iterator[Fleet]:
        link = Link()
        link.receive = failure
        yield link.line()

    monkeypatch.setattr(fleet, "join", join)


def put_out() -> None:
    """Do what Flower does when the link no longer knows a node key (supercore/retry/http_retry)."""
    asked = httpx.Request("POST", "https://127.0.0.1:9092/v1/fleet/pull-messages")
    try:
        raise httpx.HTTPStatusError("no", request=asked, response=httpx.Response(401, request=asked))
    except httpx.HTTPStatusError:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def fail_the_heartbeats() -> None:
    def failing() -> None:
        raise RuntimeError("Heartbeat failed unexpectedly.")

    thread = threading.Thread(target=failing)
    thread.start()
    thread.join()
    time.sleep(5)


@pytest.mark.parametrize(
    ("failure", "said"), [(put_out, "not enrolled, was revoked"), (fail_the_heartbeats, "Heartbeat failed")]
)
def test_no_silent_end(joined: Home, monkeypatch: pytest.MonkeyPatch, failure: Callable, said: str) -> None:
    answers_with(failure, monkeypatch)
    with pytest.raises(FederationError, match=said):
        relay.run(joined, SOCKET, State(joined.relay_state))
    assert said in json.loads(joined.relay_state.read_text())["ended"]


def test_a_stop_is_a_stop(joined: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    answers_with(lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    relay.run(joined, SOCKET, State(joined.relay_state))
    assert json.loads(joined.relay_state.read_text())["ended"] == "stopped"


def test_list_of_bundles(tmp_path: Path) -> None:
    path = tmp_path / "bundles.txt"
    assert trust.read_bundles(path) is None
    path.write_text(f"# of the coordinator\n{'A' * 64} # release 1\n\n")
    assert trust.read_bundles(path) == {"a" * 64}
    path.write_text("# none\n")
    assert trust.read_bundles(path) == frozenset()
    for wrong in ("g" * 64, "a" * 63, "a" * 64 + " " + "b" * 64):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="64 hexadecimal"):
            trust.read_bundles(path)
    path.write_bytes(b"\n" * (trust.MAX_BUNDLES_BYTES + 1))
    with pytest.raises(ConfigError):
        trust.read_bundles(path)
