"""One question to many sites over Flower's Grid: replies in a fixed order, failures as codes, never a wait for ever."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from flwr.serverapp import Grid

from common import wire
from common.errors import RefusalCode, WireError
from common.messages import Reply, Request

POLL_S = 0.1


@final
@dataclass(frozen=True)
class Answer:
    """A site's reply, or the code of what went wrong."""

    node_id: int
    reply: Reply | None
    code: str = ""


def ask(grid: Grid, requests: Mapping[int, Request], timeout_s: float) -> Iterator[Answer]:
    """Ask each node its own question and yield the answers in the order of the questions.

    Args:
        grid: Flower's grid.
        requests: One request a node, in the order in which answers are wanted.
        timeout_s: After this, missing answers are "timeout"; also the messages' time to live, so that no site works
            on a stale round.

    Yields:
        One answer a node. In the order asked, so that sums of floats do not depend on who was faster.
    """
    messages = [wire.encode_request(request, node_id, timeout_s) for node_id, request in requests.items()]
    ids = list(grid.push_messages(messages))
    del messages
    node_of = {message_id: node_id for message_id, node_id in zip(ids, requests, strict=False) if message_id}
    arrived: dict[int, Answer] = {node_id: Answer(node_id, None, "not-sent") for node_id in requests}
    for node_id in node_of.values():
        del arrived[node_id]
    deadline = time.monotonic() + timeout_s
    for node_id in requests:
        while node_id not in arrived:
            if time.monotonic() > deadline:
                arrived[node_id] = Answer(node_id, None, "timeout")
                break
            if not _pull(grid, node_of, requests, arrived):
                time.sleep(POLL_S)
        yield arrived.pop(node_id)


def _pull(grid: Grid, node_of: dict[str, int], requests: Mapping[int, Request], arrived: dict[int, Answer]) -> bool:
    """Take what has come; error replies are mapped by the message they answer, since their sender may be the link."""
    waiting: Sequence[str] = [message_id for message_id, node_id in node_of.items() if node_id not in arrived]
    pulled = list(grid.pull_messages(waiting))
    for message in pulled:
        node_id = node_of.pop(message.metadata.reply_to_message_id, None)
        if node_id is None:
            continue
        if message.has_error():
            arrived[node_id] = Answer(node_id, None, f"flower-{message.error.code}")
            continue
        arrived[node_id] = _decoded(node_id, requests[node_id], message)
    return bool(pulled)


def _decoded(node_id: int, request: Request, message: wire.Message) -> Answer:
    try:
        reply = wire.decode_reply(message)
    except WireError:
        return Answer(node_id, None, "malformed-reply")
    if reply.refusal is not None:
        return Answer(node_id, None, reply.refusal.value)
    if (reply.kind, reply.run_id, reply.round) != (request.kind, request.run_id, request.round):
        return Answer(node_id, None, "wrong-reply")
    return Answer(node_id, reply)


PERMANENT = frozenset({RefusalCode.OVER_BUDGET.value, RefusalCode.POLICY.value, RefusalCode.NO_DATA.value})
"""Codes after which asking the same site again is of no use in this run."""
