import math
import time
from collections.abc import Callable, Iterable

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from common import wire
from common.crypto import SigningKey
from common.errors import FederationError, RefusalCode, WireError
from common.messages import Kind, Reply, Request
from common.seal import Trust, check_request, sign_reply
from server import exchange
from server.exchange import Link, ask, patiently


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


def _signed(
    name: str, refusal: RefusalCode | None = None, site: str = "", asked: str = ""
) -> Callable[[Message], Message]:
    def answer(message: Message) -> Message:
        request = wire.decode_request(message)
        check_request(COORDINATOR.verify_key, request, time.time(), SITES[asked or name].verify_key)
        fields = {} if refusal else {"site": site or name}
        reply = Reply(request.kind, request.run_id, request.round, refusal, fields)
        return wire.encode_reply(sign_reply(SITES[name], request, reply), message)

    return answer


def _ask_signed(answers: dict, names: dict[int, str] | None) -> dict[int, str]:
    grid = FakeGrid(answers)
    kind, number = (Kind.HELLO, 0) if names is None else (Kind.TRAIN, 1)
    requests = {node: Request(kind, "run", number, "{}") for node in sorted(answers)}
    return {answer.node_id: answer.code for answer in ask(Link(grid, TRUST), requests, 5.0, names)}


def test_answers_are_the_sites_own() -> None:
    answers = {
        1: _signed("a"),
        2: _signed("a", asked="b"),
        3: _ok,
        4: _signed("c", RefusalCode.OVER_BUDGET),
        5: _refuse,
    }
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


class LateGrid(FakeGrid):
    """Loses the first answer of a node and delivers it with the answers to later questions, and each answer twice."""

    def __init__(self, answers: dict) -> None:
        super().__init__(answers)
        self.number, self.late = 0, list[Message]()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.number += 1
        ids = []
        for message in messages:
            ids.append(f"q{self.number}-{message.metadata.dst_node_id}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.pending[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        there = [self.pending.pop(name) for name in message_ids if name in self.pending]
        answered = [self.answers[message.metadata.dst_node_id](message) for message in there]
        if self.number == 1:
            self.late += answered
            return []
        return [*self.late, *answered, *answered]


def test_a_late_answer_to_an_earlier_question_is_dropped() -> None:
    """It costs its own round and no other: the next question gets its own answer, once."""
    grid, names = LateGrid({1: _signed("a")}), {1: "a"}

    def ask_once(number: int) -> list[tuple[str, int | None]]:
        requests = {1: Request(Kind.TRAIN, "run", number, "{}")}
        answers = ask(Link(grid, TRUST), requests, 0.3, names)
        return [(answer.code, answer.reply and answer.reply.round) for answer in answers]

    assert ask_once(1) == [("timeout", None)]
    assert ask_once(2) == [("", 2)]
    assert ask_once(3) == [("", 3)]


def test_an_answer_that_is_there_counts_however_long_the_one_before_took() -> None:
    grid = FakeGrid({1: _ok, 2: _ok})
    requests = {node: Request(Kind.TRAIN, "run", 1, "{}") for node in (1, 2)}
    codes = []
    for answer in ask(Link(grid), requests, 0.1):
        codes.append(answer.code)
        time.sleep(0.2)  # what the coordinator does with it
    assert codes == ["", ""]


def test_bytes_and_seconds_of_an_answer_are_told() -> None:
    def with_weights(message: Message) -> Message:
        request = wire.decode_request(message)
        arrays = {"w": np.zeros((3, 5), np.float32)}
        return wire.encode_reply(Reply(request.kind, request.run_id, request.round, None, {}, arrays), message)

    question = Request(Kind.TRAIN, "run", 1, "{}", {}, {"w": np.zeros(7, np.float32), "v": np.zeros(1, np.float32)})
    grid = FakeGrid({1: with_weights, 2: "silent"})
    first, second = ask(Link(grid), {1: question, 2: question}, 0.3)
    assert (first.download_bytes, first.upload_bytes) == (32, 60)
    assert 0 <= first.seconds < 0.3
    assert (second.code, second.download_bytes, second.upload_bytes) == ("timeout", 32, 0)


class BreakingGrid(FakeGrid):
    """Raises what Flower's grid raises, so many times each."""

    def __init__(self, answers: dict, error: Exception, times: int) -> None:
        super().__init__(answers)
        self.error, self.left = error, {"push": times, "pull": times}

    def _break(self, what: str) -> None:
        if self.left[what]:
            self.left[what] -= 1
            raise self.error

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._break("push")
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self._break("pull")
        return super().pull_messages(message_ids)


def test_a_link_that_breaks_off_is_asked_again() -> None:
    error = httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol")
    assert _ask(BreakingGrid({1: _ok}, error, 2)) == {1: ""}


def test_a_link_that_stays_broken_ends_the_wait() -> None:
    def away() -> None:
        raise httpx.ConnectError("EOF")

    with pytest.raises(FederationError, match=r"not answered for 0 s.*resume"):
        patiently(away, outage_s=0.2)


def test_another_certificate_is_not_waited_for() -> None:
    error = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    with pytest.raises(httpx.ConnectError):
        _ask(BreakingGrid({1: _ok}, error, 1))


def test_questions_that_the_link_lost_are_not_sent() -> None:
    response = httpx.Response(404, request=httpx.Request("POST", "https://link"))
    error = httpx.HTTPStatusError("no such session", request=response.request, response=response)
    assert _ask(BreakingGrid({1: _ok, 2: _ok}, error, 1)) == {1: "not-sent", 2: "not-sent"}


def test_made_up_parts_cost_one_site() -> None:
    """Of what lies at the link for several sites, one that Flower cannot put together."""

    class Bad:
        def pull_messages(self, ids):
            if "made up" in ids:
                raise DecodeError("patient 17")
            if "too large" in ids:
                raise WireError("a chunk twice")
            if "neither content nor error" in ids:
                body = deflated.split(b"\0", 1)[1]
                inflate_object_from_contents("a", {"a": f"Message  {len(body)}".encode() + b"\0" + body})
            return [message] if "good" in ids else []

    message = Message(RecordDict(), dst_node_id=5, message_type="train.round")
    message.metadata.__dict__["_reply_to_message_id"] = "good"
    deflated = message.deflate()
    bad = ["made up", "too large", "neither content nor error"]
    found = list(exchange._one_by_one(Bad(), [*bad, "good", "late"]))
    assert found == [*[(name, None) for name in bad], ("good", message)]


def test_the_deadline_is_known_below_the_grid() -> None:
    """While the answers to a question are pulled, and not after."""
    seen = list[float]()

    class Looking(FakeGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            seen.append(exchange.ANSWERS_UNTIL.get() - time.monotonic())
            return super().pull_messages(message_ids)

    assert _ask(Looking({1: _ok}), timeout_s=60.0) == {1: ""}
    assert 0 < max(seen) <= 60
    assert exchange.ANSWERS_UNTIL.get() == math.inf
