"""A part of a reply that is pushed twice, since the answer to the first push was lost."""

import pytest
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, ObjectUnavailableError
from flwr.supercore.task_identity import TaskIdentity

from client.fleet import Fleet
from common import wire
from common.messages import Kind, Request


@pytest.fixture
def message() -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 8, 1
    return wire.encode_request(Request(Kind.HELLO, "run-1", 0, ""), 5, 60.0)


def line(has_it: bool) -> tuple[Fleet, list[str]]:
    """A link that refuses every part: it has it already, or it does not want it."""
    stored: dict[str, bytes] = {}
    pushed: list[str] = []

    def send(reply: Message, tree: object, worked_s: float) -> tuple[set[str], str]:
        return {reply.object_id}, "session"

    def push(run_id: int, session: str, name: str, content: bytes) -> None:
        pushed.append(name)
        if has_it:
            stored[name] = content
        raise ObjectPushError(name, run_id, session)

    def pull(run_id: int, name: str) -> bytes:
        if name not in stored:
            raise ObjectUnavailableError(name)
        return stored[name]

    def nothing(*_: object) -> None:
        return None

    return Fleet((5, nothing, send, nothing, nothing, pull, push, nothing)), pushed


def test_a_part_that_the_link_has_is_no_loss(message: Message) -> None:
    fleet, pushed = line(has_it=True)
    fleet.send(message)
    assert len(pushed) == 1


def test_a_part_that_the_link_has_not_is_one(message: Message) -> None:
    fleet, _ = line(has_it=False)
    with pytest.raises(ObjectPushError):
        fleet.send(message)
