"""One question to many sites over Flower's Grid: replies in a fixed order, failures as codes, never a wait for ever.

With keys, each question is signed for one site, and what a site did not sign for this very question is no answer.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from flwr.serverapp import Grid

from common import wire
from common.crypto import VerifyKey
from common.errors import RefusalCode, WireError
from common.messages import Reply, Request
from common.seal import Trust, check_reply, seal_request

POLL_S, LONGEST_POLL_S = 0.1, 2.0


@final
@dataclass(frozen=True)
class Answer:
    """A site's reply, or the code of what went wrong."""

    node_id: int
    reply: Reply | None
    code: str = ""


@final
@dataclass(frozen=True)
class Link:
    """The way to the sites.

    Attributes:
        grid: Flower's grid: in this process, on Ray, or over the network.
        trust: The coordinator's key and those of the enrolled sites; None within one machine.
    """

    grid: Grid
    trust: Trust | None = None


UNSIGNED = frozenset({RefusalCode.UNREACHABLE, RefusalCode.BAD_REQUEST, RefusalCode.INTERNAL})
"""Refusals that a relay gives itself, which has no key: they cost the site this answer and nothing else."""


def ask(
    link: Link, requests: Mapping[int, Request], timeout_s: float, names: Mapping[int, str] | None = None
) -> Iterator[Answer]:
    """Ask each node its own question and yield the answers in the order of the questions.

    Args:
        link: The way to the nodes.
        requests: One request a node, in the order in which answers are wanted.
        timeout_s: After this, missing answers are "timeout"; also the messages' time to live and the deadline that is
            signed, so that no site works on a stale round.
        names: The site behind each node, as it said when it was greeted; None in the greeting.

    Yields:
        One answer a node. In the order asked, so that sums of floats do not depend on who was faster.

    Guarantees:
        - answers_are_the_sites_own: With keys, a reply that is not signed by the enrolled site of its node for this
          very question is no answer but a code.
    """
    grid, trust = link.grid, link.trust
    if trust is not None:
        until = time.time() + timeout_s
        requests = {node_id: seal_request(trust.key, request, until) for node_id, request in requests.items()}
    messages = wire.encode_requests(requests, timeout_s)
    ids = list(grid.push_messages(messages))
    del messages
    node_of = {message_id: node_id for message_id, node_id in zip(ids, requests, strict=False) if message_id}
    arrived: dict[int, Answer] = {node_id: Answer(node_id, None, "not-sent") for node_id in requests}
    for node_id in node_of.values():
        del arrived[node_id]
    asked = time.monotonic()
    for node_id in requests:
        while node_id not in arrived:
            if time.monotonic() > asked + timeout_s:
                arrived[node_id] = Answer(node_id, None, "timeout")
                break
            if not _pull(link, node_of, requests, names, arrived):
                time.sleep(pause_s(time.monotonic() - asked))
        yield arrived.pop(node_id)


def pause_s(waited_s: float) -> float:
    """Return how long to sleep before the next look for answers: a twentieth of the wait so far, within bounds.

    Every look is work for the link, which has better to do while sites train for minutes.

    >>> [pause_s(waited_s) for waited_s in (0.0, 1.0, 10.0, 600.0)]
    [0.1, 0.1, 0.5, 2.0]
    """
    return min(max(POLL_S, waited_s / 20), LONGEST_POLL_S)


def _pull(
    link: Link,
    node_of: dict[str, int],
    requests: Mapping[int, Request],
    names: Mapping[int, str] | None,
    arrived: dict[int, Answer],
) -> bool:
    """Take what has come; error replies are mapped by the message they answer, since their sender may be the link."""
    waiting: Sequence[str] = [message_id for message_id, node_id in node_of.items() if node_id not in arrived]
    pulled = list(link.grid.pull_messages(waiting))
    for message in pulled:
        node_id = node_of.pop(message.metadata.reply_to_message_id, None)
        if node_id is None:
            continue
        if message.has_error():
            arrived[node_id] = Answer(node_id, None, f"flower-{message.error.code}")
            continue
        name = None if names is None else names[node_id]
        arrived[node_id] = _decoded(node_id, requests[node_id], message, link.trust, name)
    return bool(pulled)


def _decoded(node_id: int, request: Request, message: wire.Message, trust: Trust | None, name: str | None) -> Answer:
    try:
        reply = wire.decode_reply(message)
    except WireError:
        return Answer(node_id, None, "malformed-reply")
    if trust is not None and not (reply.refusal in UNSIGNED and not reply.signature):
        try:
            check_reply(_key(trust, reply, name), request, reply)
        except WireError:
            return Answer(node_id, None, "forged-reply")
    if reply.refusal is not None:
        return Answer(node_id, None, reply.refusal.value)
    if (reply.kind, reply.run_id, reply.round) != (request.kind, request.run_id, request.round):
        return Answer(node_id, None, "wrong-reply")
    return Answer(node_id, reply)


def _key(trust: Trust, reply: Reply, name: str | None) -> VerifyKey:
    """Return the key of the site that a node is, or in the greeting claims to be."""
    claimed = reply.fields.get("site") if name is None else name
    key = trust.sites.get(claimed) if isinstance(claimed, str) else None
    if key is None:
        raise WireError("Expected an answer of an enrolled site.")
    return key


PERMANENT = frozenset({RefusalCode.OVER_BUDGET.value, RefusalCode.POLICY.value, RefusalCode.NO_DATA.value})
"""Codes after which asking the same site again is of no use in this run."""
