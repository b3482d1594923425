"""One question to many sites over Flower's Grid: replies in a fixed order, failures as codes, never a wait for ever.

With keys, each question is signed for one site, and what a site did not sign for this very question is no answer.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TypeVar, final

import httpx
from flwr.serverapp import Grid

from common import wire
from common.crypto import VerifyKey
from common.errors import FederationError, RefusalCode, StorageError, WireError
from common.messages import Reply, Request
from common.parts import MADE_UP
from common.seal import Trust, check_reply, seal_request
from server.registered import Registered

LOG = logging.getLogger("fedmedgan.exchange")

POLL_S, LONGEST_POLL_S = 0.1, 2.0
OUTAGE_S = 600.0
"""A link that fails otherwise than by being away, for which Flower's grid waits by itself, is waited for this long."""
LONGEST_PAUSE_S = 10.0
ANSWERS_UNTIL: ContextVar[float] = ContextVar("ANSWERS_UNTIL", default=math.inf)
"""The deadline of the question under way, on the monotonic clock: for who fetches parts below Flower's grid."""

Result = TypeVar("Result")


@final
@dataclass(frozen=True)
class Answer:
    """A site's reply, or the code of what went wrong.

    Attributes:
        node_id: Whose.
        reply: None where something went wrong.
        code: What went wrong; else empty.
        release: With OTHER_PROTOCOL the release that answered, as it says.
        seconds: From the question to the reply.
        upload_bytes: Bytes of the reply's arrays on the wire.
        download_bytes: Bytes of the question's arrays on the wire.
    """

    node_id: int
    reply: Reply | None
    code: str = ""
    release: wire.Release | None = None
    seconds: float = 0.0
    upload_bytes: int = 0
    download_bytes: int = 0


@final
@dataclass(frozen=True)
class Link:
    """The way to the sites.

    Attributes:
        grid: Flower's grid: in this process, on Ray, or over the network.
        trust: The coordinator's key and those of the enrolled sites; None within one machine.
        nodes: The site that each node was let in as. With keys, a node that answers as another one is left out.
        deadline_s: How long the round under way waits for answers; None: `federation.round_timeout_s`.
        registered: Reads keys and nodes anew; None within one machine.
    """

    grid: Grid
    trust: Trust | None = None
    nodes: Mapping[int, str] = field(default_factory=dict[int, str])
    deadline_s: float | None = None
    registered: Callable[[], Registered] | None = None


OTHER_PROTOCOL = "other-protocol"


def open_link(grid: Grid, registered: Callable[[], Registered] | None) -> Link:
    """Return the way to the sites that may take part now.

    Raises:
        StorageError: Who may take part cannot be read.
    """
    now = None if registered is None else registered()
    return Link(grid) if now is None else Link(grid, now.trust, now.nodes, registered=registered)


def as_registered(link: Link) -> Link:
    """Return the link with the keys and nodes of this moment; with those of before where they cannot be read."""
    try:
        now = None if link.registered is None else link.registered()
    except (StorageError, WireError) as error:
        LOG.error("who may take part stays as it was: %s", error)
        return link
    return link if now is None else replace(link, trust=now.trust, nodes=now.nodes)


def patiently(ask_grid: Callable[[], Result], outage_s: float = OUTAGE_S) -> Result:
    """Ask the grid, and while the link breaks connections off, ask again with growing pauses.

    Flower's grid waits for a link that refuses connections, but gives up when one ends in the middle of its TLS
    handshake, as it does when the link is killed.

    Raises:
        FederationError: It went on for `outage_s`.
        httpx.TransportError: The link's certificate is not the one that this run trusts: waiting does not mend that.
    """
    started, pause_s = time.monotonic(), POLL_S
    while True:
        try:
            return ask_grid()
        except httpx.TransportError as error:
            if "certificate" in str(error).lower():
                raise
            if time.monotonic() - started > outage_s:
                raise FederationError(
                    f"The link has not answered for {outage_s:.0f} s ({error}). Look at logs/link.log, then resume."
                ) from error
            LOG.warning("the link broke off: %s", error)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


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
        - made_up_parts_cost_one_site: Parts that are no message cost their site its answer, and nobody else's.
    """
    grid, trust = link.grid, link.trust
    if trust is not None:
        until = time.time() + timeout_s
        of = {node_id: trust.sites.get(name) for node_id, name in (names or {}).items()}
        requests = {node: seal_request(trust.key, request, until, of.get(node)) for node, request in requests.items()}
    messages = wire.encode_requests(requests, timeout_s)
    sent_bytes = [wire.array_bytes(message) for message in messages]
    asked = time.monotonic()
    ids = _push(grid, messages)
    del messages
    node_of = {message_id: node_id for message_id, node_id in zip(ids, requests, strict=False) if message_id}
    arrived: dict[int, Answer] = {node_id: Answer(node_id, None, "not-sent") for node_id in requests}
    for node_id in node_of.values():
        del arrived[node_id]
    for node_id, download_bytes in zip(requests, sent_bytes, strict=True):
        while node_id not in arrived:
            with _answers_until(asked + timeout_s):
                pulled = _pull(link, node_of, requests, names, arrived, asked)
            if pulled or node_id in arrived:
                continue
            if time.monotonic() > asked + timeout_s:  # looked at last: what is there was in time
                arrived[node_id] = Answer(node_id, None, "timeout")
            else:
                time.sleep(pause_s(time.monotonic() - asked))
        yield replace(arrived.pop(node_id), download_bytes=download_bytes)


@contextmanager
def _answers_until(deadline: float) -> Generator[None]:
    before = ANSWERS_UNTIL.set(deadline)
    try:
        yield
    finally:
        ANSWERS_UNTIL.reset(before)


def _push(grid: Grid, messages: Sequence[wire.Message]) -> list[str]:
    try:
        return list(patiently(lambda: grid.push_messages(messages)))
    except httpx.HTTPStatusError as error:  # the link lost a part of it on the way: this attempt is in vain
        LOG.warning("the link did not take the questions: %s", error)
        return []


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
    asked: float,
) -> bool:
    """Take what has come; error replies are mapped by the message they answer, since their sender may be the link."""
    waiting: Sequence[str] = [message_id for message_id, node_id in node_of.items() if node_id not in arrived]
    pulled = list(_one_by_one(link.grid, waiting))
    for message_id, message in pulled:
        node_id = node_of.pop(message_id, None)
        if node_id is None:  # to an earlier question, or a second one to this
            continue
        if message is None:
            arrived[node_id] = Answer(node_id, None, "malformed-reply")
            continue
        if message.has_error():
            arrived[node_id] = Answer(node_id, None, f"flower-{message.error.code}")
            continue
        name = None if names is None else names[node_id]
        answer = _decoded(node_id, requests[node_id], message, link.trust, name)
        seconds, size = round(time.monotonic() - asked, 3), wire.array_bytes(message)
        arrived[node_id] = replace(answer, seconds=seconds, upload_bytes=size)
    return bool(pulled)


def _one_by_one(grid: Grid, waiting: Sequence[str]) -> Iterator[tuple[str, wire.Message | None]]:
    """Yield each answer that has come with the id of its question, None where its parts are no message.

    Flower puts parts together as they came. If those of one answer are no message, the call fails, and with it go the
    others that were asked for in the same call: so each is asked for alone.
    """
    for message_id in waiting:
        try:
            for message in patiently(functools.partial(_pull_one, grid, message_id)):
                yield message.metadata.reply_to_message_id, message
        except (*MADE_UP, WireError):
            yield message_id, None


def _pull_one(grid: Grid, message_id: str) -> list[wire.Message]:
    return list(grid.pull_messages([message_id]))


def _decoded(node_id: int, request: Request, message: wire.Message, trust: Trust | None, name: str | None) -> Answer:
    try:
        reply = wire.decode_reply(message)
    except WireError:
        if (release := wire.other_release(message)) is not None:
            return Answer(node_id, None, OTHER_PROTOCOL, release)
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
