"""Who takes part: the sites that answered the greeting, with the plan that follows from what they declared."""

import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import final

from common.config import Config
from common.errors import ConfigError, FederationError, WireError
from common.greeting import Greeting, hello_settings, parse_greeting
from common.messages import Kind, Request
from common.plan import Plan, plan
from server.exchange import POLL_S, Answer, Link, as_registered, ask, patiently
from server.handshake import other_proposal, other_protocol
from server.records import Waiting

LONGEST_LOOK_S = 3.0
"""Between two looks at who is connected."""


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
class Roster:
    """Who was greeted.

    Attributes:
        members: The sites that take part, by name.
        left_out: Why others do not, by the site's name or its node.
    """

    members: Mapping[str, Member]
    left_out: Mapping[str, str]

    @property
    def greetings(self) -> Mapping[str, Greeting]:
        """What the members said of themselves."""
        return {name: member.greeting for name, member in self.members.items()}


def gather(
    link: Link, config: Config, run_id: str, known: Roster | None
) -> Generator[Waiting, None, tuple[Link, Roster]]:
    """Return who is here and may be, and the link with their keys; wait for sites where fewer are left than must be.

    A round that asks nobody is no attempt at it: a line that is cut for a minute must not end a run.

    Args:
        link: The way to the sites.
        config: The run's configuration.
        run_id: The run.
        known: Who was greeted so far; None at the start.

    Yields:
        For whom it waits, at each change.

    Raises:
        FederationError: Too few came in `federation.connect_timeout_s`.
    """
    link, roster = as_registered(link), Roster({}, {})
    if known is not None:
        roster = greet(link, config, run_id, known.members)
    if known is None or len(roster.members) < config.federation.min_sites:
        link, members = yield from wait_for_sites(link, config, run_id, roster.members)
        again = greet(link, config, run_id, members)
        roster = Roster(again.members, {**roster.left_out, **again.left_out})
    return link, roster


def wait_for_sites(
    link: Link, config: Config, run_id: str, members: Mapping[str, Member]
) -> Generator[Waiting, None, tuple[Link, Mapping[str, Member]]]:
    """Wait until all expected sites are connected, or as many as there must be when the time is over.

    Expected are all enrolled sites, or within one machine `simulation.sites`. The pauses between two looks grow.

    Args:
        link: The way to the sites.
        config: The run's configuration.
        run_id: The run.
        members: The sites that were heard already.

    Yields:
        For whom it waits: at first, and whenever another number of sites is connected.

    Returns:
        The link with the keys of whoever is enrolled by then, and the members that were greeted meanwhile.

    Raises:
        FederationError: Fewer than `federation.min_sites` connected in `federation.connect_timeout_s`.
    """
    allowed_s, needed = config.federation.connect_timeout_s, config.federation.min_sites
    deadline, pause_s, shown = time.monotonic() + allowed_s, POLL_S, -1
    while (here := _connected(link)) < _expected(link, config) and (left_s := deadline - time.monotonic()) > 0:
        if here != shown:
            members = greet(link, config, run_id, members).members
            yield Waiting(here, _expected(link, config), needed, _missing(link, members), left_s)
            shown, pause_s = here, POLL_S
        time.sleep(min(pause_s, left_s))
        pause_s, link = min(1.5 * pause_s, LONGEST_LOOK_S), as_registered(link)
    if here < needed:
        missing = ", ".join(_missing(link, members))
        names = f" Not heard: {missing}." if missing else ""
        raise FederationError(
            f"Expected at least federation.min_sites={needed} sites within {allowed_s:.0f} s, {here} connected.{names} "
            "Start the sites, then resume."
        )
    return link, members


def _expected(link: Link, config: Config) -> int:
    return (0 if link.trust is None else len(link.trust.sites)) or config.simulation.sites


def _missing(link: Link, members: Mapping[str, Member]) -> tuple[str, ...]:
    return () if link.trust is None else tuple(sorted(link.trust.sites.keys() - members.keys()))


def _connected(link: Link) -> int:
    return len(list(patiently(link.grid.get_node_ids)))


def greet(link: Link, config: Config, run_id: str, known: Mapping[str, Member]) -> Roster:
    """Ask every node that is not yet known who it is, and return all members by name, sorted.

    A node that does not answer, speaks another protocol, reads the proposal otherwise, declares nonsense or takes a
    known name is left out, with the reason; it is asked again next round.

    Guarantees:
        - one_site_its_own_node: With keys, a node that answers as another site than it was let in as takes no part,
          whoever signed for it.
        - revoked_is_out: Who was revoked takes no part from the next greeting on, whatever its node does.
    """
    present = set(patiently(link.grid.get_node_ids))
    members = {name: known[name] for name in known if known[name].node_id in present and _may(link, known[name])}
    new = sorted(present - {member.node_id for member in members.values()})
    left_out = _shut_out(link, known, new)
    if link.trust is not None:
        new = [node_id for node_id in new if link.nodes.get(node_id) in link.trust.sites]
    requests = {node_id: Request(Kind.HELLO, run_id, 0, config.proposal(), hello_settings()) for node_id in new}
    for answer in ask(link, requests, config.federation.connect_timeout_s):
        member = _member(config, answer)
        if isinstance(member, Member) and not _may(link, member):
            member = f"its node answers as {member.name}: one site, its own node"
        if isinstance(member, Member) and member.name in members:
            member = f"its name, {member.name}, is taken: one site, one node"
        if isinstance(member, Member):
            members[member.name] = member
        else:
            left_out[_called(link, answer.node_id)] = member
    return Roster(dict(sorted(members.items())), left_out)


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
