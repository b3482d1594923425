"""What of Flower's log a run's own process writes, and where."""

import logging
import sys
import time

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.exit.exit_code import EXIT_CODE_HELP
from flwr.supercore.exit.exit_code import ExitCode as FlowerExit
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid

from common.errors import FederationError
from server import exchange
from server.run_process import _Brief, _log_apart, pull_reply


def _record(error: Exception | None, text: str = "%s raised an exception") -> logging.LogRecord:
    info = None if error is None else (type(error), error, None)
    return logging.LogRecord("flwr", logging.ERROR, "", 0, text, ("ServerApp",) if "%s" in text else (), info)


def test_an_error_that_a_person_can_mend_is_its_message() -> None:
    record = _record(FederationError("Start the sites, then resume."))
    assert _Brief().filter(record)
    assert (record.getMessage(), record.exc_info) == ("Start the sites, then resume.", None)


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    record = _record(KeyError("x"))
    assert _Brief().filter(record)
    assert record.exc_info is not None


def test_empty_lines_are_dropped() -> None:
    assert not _Brief().filter(_record(None, ""))


@pytest.mark.parametrize(("error", "kept"), [(FederationError("Too few sites."), False), (KeyError("x"), True)])
def test_an_end_with_a_reason_is_no_unhandled_exception(error: Exception, kept: bool) -> None:
    brief, last_words = _Brief(), f"Exit Code: 201\n{EXIT_CODE_HELP[FlowerExit.SERVERAPP_EXCEPTION]}"
    assert brief.filter(_record(None, last_words))  # of another fault
    brief.filter(_record(error))
    assert brief.filter(_record(None, last_words)) == kept


def test_flowers_words_are_not_mirrored(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever mirrors sys.stderr and sys.stdout to the follower does not see them; the executor's log does."""
    flower, seen = logging.getLogger("flwr"), []
    before = (flower.handlers, flower.propagate, flower.level)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "write", seen.append)
    try:
        _log_apart()
        flower.warning("retrying")
        (handler,) = flower.handlers
        handler.stream.close()
    finally:
        flower.handlers, flower.propagate, flower.level = before
    monkeypatch.undo()
    assert seen == []
    assert "WARNING flwr retrying" in capfd.readouterr().err


Reply = tuple[ProtoMessage, ObjectTree, dict[str, bytes]]


class Link:
    """What Flower's grid asks of the link, for replies that it knows by the question that they answer."""

    def __init__(self, replies: dict[str, Reply]) -> None:
        self.replies, self.confirmed = replies, list[str]()

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802
        envelope, tree, _ = self.replies[request.message_ids[0]]
        return PullAppMessagesResponse(messages_list=[envelope], message_object_trees=[tree])

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        content = {name: part for *_, parts in self.replies.values() for name, part in parts.items()}
        part = content.get(request.object_id)
        return PullObjectResponse(object_found=True, object_available=part is not None, object_content=part or b"")

    def ConfirmMessageReceived(self, request: ConfirmMessageReceivedRequest) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


def reply(to: str, lists: int = 1) -> Reply:
    """A reply to a question; its array lists its one chunk so many times."""
    body = to.encode() * 1000
    arrays = ArrayRecord({"body": Array("uint8", (len(body),), "x", body)})
    made = Message(RecordDict({"arrays": arrays}), dst_node_id=5, message_type="train.round")
    made.metadata.__dict__["_reply_to_message_id"] = to
    parts, tree, renamed = dict[str, bytes](), ObjectTree(), ("", "")
    for name, part in get_all_nested_objects(made).items():  # from the chunk up to the message
        content = part.deflate().replace(renamed[0].encode(), renamed[1].encode()) if renamed[0] else part.deflate()
        if content.startswith(b"Array ") and lists > 1:
            head, _, listing = content.partition(b"\0")
            listing = listing.replace(b"[0]", str([0] * lists).encode())
            content = b"%b %d\0%b" % (head.rpartition(b" ")[0], len(listing), listing)
        renamed = (name, get_object_id(content))
        parts[renamed[1]] = content
        tree = ObjectTree(object_id=renamed[1], children=[tree] if tree.object_id else [])
    envelope = message_to_proto(remove_content_from_message(made))
    envelope.metadata.message_id = tree.object_id
    return envelope, tree, parts


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> http_grid.HttpGrid:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 8, 1
    monkeypatch.setattr(http_grid, "pull_objects", pull_reply)
    made = http_grid.HttpGrid(token="t")
    made.set_run(Run.create_empty(7))
    return made


def pulled(grid: http_grid.HttpGrid, link: Link) -> list[tuple[str, str]]:
    grid._client = link  # type: ignore[assignment]
    found = exchange._one_by_one(grid, list(link.replies))
    return [(name, "none" if got is None else "error" if got.has_error() else "reply") for name, got in found]


def test_a_reply_that_lists_a_chunk_many_times_costs_one_site(grid: http_grid.HttpGrid) -> None:
    link = Link({"a": reply("a"), "b": reply("b", lists=400), "c": reply("c")})
    assert pulled(grid, link) == [("a", "reply"), ("b", "none"), ("c", "reply")]
    assert len(link.confirmed) == 2


def test_a_half_sent_reply_ends_with_the_round(grid: http_grid.HttpGrid) -> None:
    """Its parts never come: it costs its own site, the others' replies are taken after the deadline, too."""
    envelope, tree, parts = reply("a")
    del parts[tree.object_id]
    link = Link({"a": (envelope, tree, parts), "b": reply("b")})
    started = time.monotonic()
    before = exchange.ANSWERS_UNTIL.set(started + 0.5)
    try:
        assert pulled(grid, link) == [("a", "error"), ("b", "reply")]
    finally:
        exchange.ANSWERS_UNTIL.reset(before)
    assert 0.5 <= time.monotonic() - started < 10


def test_a_slow_upload_has_the_time_that_the_round_has() -> None:
    """A reply is announced before its parts are sent."""
    there_at = time.monotonic() + 0.5

    def pull(name: str) -> bytes:
        if time.monotonic() < there_at:
            raise ObjectUnavailableError(name)
        return b"ArrayChunk  1\0a"

    assert pull_reply(["a"], pull) == {"a": b"ArrayChunk  1\0a"}
