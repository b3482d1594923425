"""Who takes part: the sites that answered the greeting, with the plan that follows from what they declared."""

import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import final

from common.config import Config
from common.errors import ConfigError, FederationError, RefusalCode, WireError
from common.greeting import Greeting, hello_settings, parse_greeting
from common.messages import Kind, Request
from common.plan import Plan, plan
from common.wording import counted
from server.exchange import POLL_S, Answer, Link, as_registered, ask, patiently
from server.handshake import other_proposal, other_protocol
from server.records import LATE, Waiting

LONGEST_LOOK_S = 3.0
"""Between two looks at who is connected."""
SILENCE = LATE - {RefusalCode.EXPIRED.value}
"""Codes of a greeting that nobody answered; who is too late by its own clock has answered."""
AGAIN_S = 5.0
"""A node that was silent once is waited for this long, times the rounds that it was passed over."""
MOST_ROUNDS = 8
"""So many rounds at most such a node is passed over,"""
MOST_S = 600.0
"""and for so long: rounds may take hours, and nothing else tells that its agent is well again."""


@final
@dataclass(frozen=True)
class Member:
    """A site in the federation."""

    name: str
    node_id: int
    declared_patients: int
    plan: Plan
    greeting: Greeting


@final
@dataclass(frozen=True)
class Silent:
    """A node that was silent at a greeting, or took long for nonsense.

    Attributes:
        rounds: After so many rounds it is asked again.
        left: How many of them are still to come.
        reason: What its greeting came to.
        until: By the monotonic clock it is asked again then, however many rounds are still to come.
    """

    rounds: int = 1
    left: int = 0
    reason: str = ""
    until: float = 0.0


@final
@dataclass(frozen=True)
class Roster:
    """Who was greeted.

    Attributes:
        members: The sites that take part, by name.
        left_out: Why others do not, by the site's name or its node.
        silent: The nodes that were silent at a greeting of this run.
    """

    members: Mapping[str, Member] = field(default_factory=dict[str, Member])
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    silent: Mapping[int, Silent] = field(default_factory=dict[int, Silent])

    @property
    def greetings(self) -> Mapping[str, Greeting]:
        """What the members said of themselves."""
        return {name: member.greeting for name, member in self.members.items()}


def gather(
    link: Link, config: Config, run_id: str, known: Roster | None, *, begins: bool = False
) -> Generator[Waiting, None, tuple[Link, Roster]]:
    """Return who is here and may be, and the link with their keys; wait for sites where fewer are left than must be.

    A round that asks nobody is no attempt at it: a line that is cut for a minute must not end a run.

    Args:
        link: The way to the sites.
        config: The run's configuration.
        run_id: The run.
        known: Who was greeted so far; None at the start.
        begins: Whether a round begins, for which who was silent may sit out. Else too few others are able to answer it,
            and the silent are asked at each look.

    Yields:
        For whom it waits, at each change.

    Raises:
        FederationError: Too few came in `federation.connect_timeout_s`.
    """
    link, roster = as_registered(link), Roster()
    if known is not None:
        roster = greet(link, config, run_id, replace(known, silent=_turns(known.silent, begins)))
    if known is None or len(roster.members) < config.federation.min_sites:
        link, waited = yield from wait_for_sites(link, config, run_id, roster)
        if len(waited.members) < config.federation.min_sites:  # then the silent are what the run waits for
            waited = replace(waited, silent={})
        again = greet(link, config, run_id, waited)
        roster = replace(again, left_out={**roster.left_out, **again.left_out})
    return link, roster


def wait_for_sites(
    link: Link, config: Config, run_id: str, roster: Roster
) -> Generator[Waiting, None, tuple[Link, Roster]]:
    """Wait until all expected sites are connected, or as many as there must be when the time is over.

    Expected are all enrolled sites, or within one machine `simulation.sites`. The pauses between two looks grow.

    Args:
        link: The way to the sites.
        config: The run's configuration.
        run_id: The run.
        roster: Who was greeted already.

    Yields:
        For whom it waits: at first, and whenever another number of sites is connected.

    Returns:
        The link with the keys of whoever is enrolled by then, and who was greeted meanwhile.

    Raises:
        FederationError: Fewer than `federation.min_sites` connected in `federation.connect_timeout_s`.
    """
    allowed_s, needed = config.federation.connect_timeout_s, config.federation.min_sites
    deadline, pause_s, shown = time.monotonic() + allowed_s, POLL_S, -1
    while (here := _connected(link)) < _expected(link, config) and (left_s := deadline - time.monotonic()) > 0:
        if here != shown:
            roster = greet(link, config, run_id, roster)
            yield Waiting(here, _expected(link, config), needed, missing(link, roster.members), left_s)
            shown, pause_s = here, POLL_S
        time.sleep(min(pause_s, left_s))
        pause_s, link = min(1.5 * pause_s, LONGEST_LOOK_S), as_registered(link)
    if here < needed:
        absent = ", ".join(missing(link, roster.members))
        names = f" Not heard: {absent}." if absent else ""
        raise FederationError(
            f"Expected at least federation.min_sites={needed} sites within {allowed_s:.0f} s, {here} connected.{names} "
            "Start the sites, then resume."
        )
    return link, roster


def _expected(link: Link, config: Config) -> int:
    return (0 if link.trust is None else len(link.trust.sites)) or config.simulation.sites


def missing(link: Link, members: Mapping[str, Member]) -> tuple[str, ...]:
    """Return the enrolled sites that were not heard; within one machine nobody is enrolled."""
    return () if link.trust is None else tuple(sorted(link.trust.sites.keys() - members.keys()))


def _connected(link: Link) -> int:
    return len(list(patiently(link.grid.get_node_ids)))


def greet(link: Link, config: Config, run_id: str, known: Roster) -> Roster:
    """Ask every node that is not yet known who it is, and return all members by name, sorted.

    A node that does not answer, speaks another protocol, reads the proposal otherwise, declares nonsense or takes a
    known name is left out, with the reason; it is asked again next round. Between machines one that was silent, or took
    longer than `AGAIN_S` to be left out, is asked again after 1, 2, 4 and then every 8 rounds, or after `MOST_S`, and
    waited for briefly, unless there are too few others.

    Guarantees:
        - silence_costs_little: However many nodes are silent at every greeting, they cost `connect_timeout_s` when they
          come and at most `AGAIN_S` times `MOST_ROUNDS` a round after that; each by itself `AGAIN_S` a round.
        - one_site_its_own_node: With keys, a node that answers as another site than it was let in as takes no part,
          whoever signed for it.
        - revoked_is_out: Who was revoked takes no part from the next greeting on, whatever its node does.
    """
    present = set(patiently(link.grid.get_node_ids))
    here = known.members.values()
    members = {member.name: member for member in here if member.node_id in present and _may(link, member)}
    new = sorted(present - {member.node_id for member in members.values()})
    left_out = _shut_out(link, known.members, new)
    if link.trust is not None:
        new = [node_id for node_id in new if link.nodes.get(node_id) in link.trust.sites]
    # who went away and came back is asked at once
    silent = {node_id: one if node_id in present else Silent() for node_id, one in known.silent.items()}
    left_out |= {_called(link, node_id): silent[node_id].reason for node_id in new if _is_passed_over(silent, node_id)}
    for answer, waited_s in _greetings(link, config, run_id, new, silent):
        member = _member(config, answer)
        if isinstance(member, Member) and not _may(link, member):
            member = f"its node answers as {member.name}: one site, its own node"
        if isinstance(member, Member) and member.name in members:
            member = f"its name, {member.name}, is taken: one site, one node"
        if isinstance(member, Member):
            members[member.name] = member
            continue
        if link.trust is not None and (answer.code in SILENCE or waited_s > AGAIN_S):
            silent[answer.node_id] = _more_silent(silent.get(answer.node_id), member)
            member = silent[answer.node_id].reason
        left_out[_called(link, answer.node_id)] = member
    return Roster(dict(sorted(members.items())), left_out, silent)


def _greetings(
    link: Link, config: Config, run_id: str, nodes: Iterable[int], silent: Mapping[int, Silent]
) -> Iterator[tuple[Answer, float]]:
    """Greet nodes that are new, then those whose turn has come again; yield how long each kept the others waiting."""
    longest_s = config.federation.connect_timeout_s
    new, again = [node for node in nodes if node not in silent], [node for node in nodes if node in silent]
    again = [node for node in again if not _is_passed_over(silent, node)]
    again_s = AGAIN_S * max((1, *(silent[node].rounds - silent[node].left for node in again)))
    for asked, timeout_s in ((new, longest_s), (again, min(longest_s, again_s))):
        requests = {node: Request(Kind.HELLO, run_id, 0, config.proposal(), hello_settings()) for node in asked}
        before = time.monotonic()
        for answer in ask(link, requests, timeout_s):
            yield answer, time.monotonic() - before
            before = time.monotonic()


def _turns(silent: Mapping[int, Silent], begins: bool) -> dict[int, Silent]:
    """Return who was silent as a round begins, or as all of them are to be asked now."""
    return {
        node_id: replace(one, left=max(0, one.left - 1)) if begins else replace(one, until=0.0)
        for node_id, one in silent.items()
    }


def _is_passed_over(silent: Mapping[int, Silent], node_id: int) -> bool:
    one = silent.get(node_id)
    return one is not None and one.left > 0 and time.monotonic() < one.until


def _more_silent(before: Silent | None, reason: str) -> Silent:
    """Return when a node is asked again that was silent once more; ahead of its turn, it sits out for no longer.

    >>> first = _more_silent(None, "no answer")
    >>> first.reason, _more_silent(first, "no answer").rounds, _more_silent(replace(first, left=0), "no answer").rounds
    ('no answer; it is asked again after 1 round or 10 min', 1, 2)
    """
    rounds = 1 if before is None else before.rounds if before.left else min(2 * before.rounds, MOST_ROUNDS)
    said = f"{reason}; it is asked again after {counted(rounds, 'round')} or {MOST_S / 60:.0f} min"
    return Silent(rounds, rounds, said, time.monotonic() + MOST_S)


def _may(link: Link, member: Member) -> bool:
    """Return whether a site may take part, and through this node."""
    return link.trust is None or (member.name in link.trust.sites and link.nodes.get(member.node_id) == member.name)


def _shut_out(link: Link, known: Iterable[str], nodes: Iterable[int]) -> dict[str, str]:
    """Say of members and nodes that may not take part, or not any more, why."""
    if link.trust is None:
        return {}
    names = {*known, *(link.nodes[node_id] for node_id in nodes if node_id in link.nodes)}
    revoked = dict.fromkeys(sorted(names - link.trust.sites.keys()), "it was revoked")
    return revoked | {_called(link, node): "no enrolled site has this node" for node in nodes if node not in link.nodes}


def _called(link: Link, node_id: int) -> str:
    return link.nodes.get(node_id, f"node {node_id}")


def _member(config: Config, answer: Answer) -> Member | str:
    """Let in who answered as it must, or say why not; where versions differ, with those of both sides."""
    if answer.release is not None:
        return other_protocol(answer.release)
    if answer.reply is None:
        return f"no valid answer to the greeting ({answer.code})"
    if answer.reply.arrays:
        return "no valid answer to the greeting (malformed-reply)"
    try:
        said = parse_greeting(answer.reply.fields)
        if (reason := other_proposal(config, said)) is not None:
            return reason
        return Member(said.site, answer.node_id, said.declared_patients, plan(config, said.declared_patients), said)
    except WireError:
        return "no valid answer to the greeting (malformed-reply)"
    except ConfigError as error:
        return f"nothing can be planned for it: {error}"
