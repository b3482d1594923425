import time
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from common import wire
from common.crypto import SigningKey
from common.errors import RefusalCode
from common.messages import Kind, Reply, Request
from common.seal import Trust, check_request, sign_reply
from server import exchange
from server.exchange import Link, ask


class FakeGrid(Grid):
    """Answers each node by a function, in any order, or never."""

    def __init__(self, answers: dict, order: list[int] | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.answers, self.order, self.pending = answers, order, {}

    def set_run(self, run: object) -> None: ...
    @property
    def run(self) -> object: ...
    def create_message(self, *args: object, **kwargs: object) -> Message: ...
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]: ...

    def get_node_ids(self) -> list[int]:
        return list(self.answers)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"m{node}"
            self.pending[f"m{node}"] = message
            ids.append(f"m{node}" if self.answers[node] != "not stored" else "")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids)
        nodes = self.order or sorted(self.answers)
        for node in nodes:
            message = self.pending.get(f"m{node}")
            if message is None or f"m{node}" not in wanted or not callable(self.answers[node]):
                continue
            del self.pending[f"m{node}"]
            return [self.answers[node](message)]
        return []


def _ok(message: Message) -> Message:
    request = wire.decode_request(message)
    return wire.encode_reply(Reply(request.kind, request.run_id, request.round, None, {"x": 1}), message)


def _refuse(message: Message) -> Message:
    return wire.encode_reply(Reply(Kind.TRAIN, "", 0, RefusalCode.OVER_BUDGET), message)


def _raise(message: Message) -> Message:
    return Message(Error(2, "patient 17 is broken"), reply_to=message)


def _malformed(message: Message) -> Message:
    content = RecordDict({"header": ConfigRecord({"a": 1}), "arrays": ArrayRecord({"w": Array(np.zeros(2))})})
    return Message(content, reply_to=message)


def _other_round(message: Message) -> Message:
    return wire.encode_reply(Reply(Kind.TRAIN, "run", 99), message)


def _ask(grid: FakeGrid, timeout_s: float = 5.0) -> dict[int, str]:
    requests = {node: Request(Kind.TRAIN, "run", 1, "{}") for node in sorted(grid.answers)}
    return {answer.node_id: answer.code for answer in ask(Link(grid), requests, timeout_s)}


def test_every_failure_is_a_code_and_nobody_stops_the_round() -> None:
    grid = FakeGrid({1: _ok, 2: _refuse, 3: _raise, 4: _malformed, 5: _other_round, 6: "not stored", 7: _ok})
    assert _ask(grid) == {
        1: "",
        2: "over-budget",
        3: "flower-2",
        4: "malformed-reply",
        5: "wrong-reply",
        6: "not-sent",
        7: "",
    }


def test_text_of_an_exception_is_dropped() -> None:
    assert "patient" not in str(_ask(FakeGrid({3: _raise})))


@pytest.mark.parametrize("order", [[1, 2, 3], [3, 2, 1], [2, 3, 1]])
def test_order_of_answers_does_not_depend_on_who_was_faster(order: list[int]) -> None:
    assert list(_ask(FakeGrid({1: _ok, 2: _ok, 3: _ok}, order))) == [1, 2, 3]


def test_silent_site_is_a_timeout_and_the_others_count() -> None:
    assert _ask(FakeGrid({1: _ok, 2: "silent", 3: _ok}), timeout_s=0.3) == {1: "", 2: "timeout", 3: ""}


COORDINATOR, SITES = SigningKey(bytes(32)), {name: SigningKey(name.encode() * 32) for name in "abc"}
TRUST = Trust(COORDINATOR, {name: key.verify_key for name, key in SITES.items()})


def _signed(name: str, refusal: RefusalCode | None = None, site: str = "") -> Callable[[Message], Message]:
    def answer(message: Message) -> Message:
        request = wire.decode_request(message)
        check_request(COORDINATOR.verify_key, request, time.time())
        fields = {} if refusal else {"site": site or name}
        reply = Reply(request.kind, request.run_id, request.round, refusal, fields)
        return wire.encode_reply(sign_reply(SITES[name], request, reply), message)

    return answer


def _ask_signed(answers: dict, names: dict[int, str] | None) -> dict[int, str]:
    grid = FakeGrid(answers)
    requests = {node: Request(Kind.TRAIN, "run", 1, "{}") for node in sorted(answers)}
    return {answer.node_id: answer.code for answer in ask(Link(grid, TRUST), requests, 5.0, names)}


def test_answers_are_the_sites_own() -> None:
    answers = {1: _signed("a"), 2: _signed("a"), 3: _ok, 4: _signed("c", RefusalCode.OVER_BUDGET), 5: _refuse}
    codes = _ask_signed(answers, {1: "a", 2: "b", 3: "c", 4: "c", 5: "c"})
    assert codes == {1: "", 2: "forged-reply", 3: "forged-reply", 4: "over-budget", 5: "forged-reply"}


def test_a_greeting_is_believed_if_the_site_it_names_signed_it() -> None:
    assert _ask_signed({1: _signed("a"), 2: _signed("a", site="b"), 3: _signed("a", site="new")}, None) == {
        1: "",
        2: "forged-reply",
        3: "forged-reply",
    }


def test_a_relay_may_say_without_a_key_that_its_agent_is_not_there() -> None:
    def gone(message: Message) -> Message:
        return wire.encode_reply(Reply(Kind.TRAIN, "", 0, RefusalCode.UNREACHABLE), message)

    assert _ask_signed({1: gone}, {1: "a"}) == {1: "unreachable"}


def test_a_reply_of_an_earlier_question_is_forged() -> None:
    kept: list[Message] = []

    def replay(message: Message) -> Message:
        kept.append(_signed("a")(message))
        first = wire.decode_reply(kept[0])
        return wire.encode_reply(first, message)

    assert _ask_signed({1: replay}, {1: "a"}) == {1: ""}
    assert _ask_signed({1: replay}, {1: "a"}) == {1: "forged-reply"}


def test_made_up_parts_cost_one_site() -> None:
    """Of what lies at the link for several sites, one that Flower cannot put together."""

    class Bad:
        def pull_messages(self, ids):
            if "made up" in ids:
                raise DecodeError("patient 17")
            return [message] if "good" in ids else []

    message = Message(RecordDict(), dst_node_id=5, message_type="train.round")
    message.metadata.__dict__["_reply_to_message_id"] = "good"
    found = list(exchange._one_by_one(Bad(), ["made up", "good", "late"]))
    assert found == [("made up", None), ("good", message)]
