"""Who takes part: the sites that answered the greeting, with the plan that follows from what they declared."""

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import final

from common.config import Config
from common.errors import ConfigError, FederationError, WireError
from common.greeting import Greeting, hello_settings, parse_greeting
from common.messages import Kind, Request
from common.plan import Plan, plan
from server.exchange import POLL_S, Answer, Link, ask, patiently
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


def gather(link: Link, config: Config, run_id: str, known: Roster | None) -> Generator[Waiting, None, Roster]:
    """Return who is here; wait for sites at the start, and whenever fewer than there must be are left.

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
    roster = Roster({}, {}) if known is None else greet(link, config, run_id, known.members)
    if known is None or len(roster.members) < config.federation.min_sites:
        members = yield from wait_for_sites(link, config, run_id, roster.members)
        roster = greet(link, config, run_id, members)
    return roster


def wait_for_sites(
    link: Link, config: Config, run_id: str, members: Mapping[str, Member]
) -> Generator[Waiting, None, Mapping[str, Member]]:
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
        The members that were greeted meanwhile, to know for whom to wait.

    Raises:
        FederationError: Fewer than `federation.min_sites` connected in `federation.connect_timeout_s`.
    """
    allowed_s, needed = config.federation.connect_timeout_s, config.federation.min_sites
    deadline, pause_s, shown = time.monotonic() + allowed_s, POLL_S, -1
    enrolled = () if link.trust is None else tuple(sorted(link.trust.sites))
    expected = len(enrolled) or config.simulation.sites
    while (here := _connected(link)) < expected and (left_s := deadline - time.monotonic()) > 0:
        if here != shown:
            members = greet(link, config, run_id, members).members
            missing = tuple(name for name in enrolled if name not in members)
            yield Waiting(here, expected, needed, missing, left_s)
            shown, pause_s = here, POLL_S
        time.sleep(min(pause_s, left_s))
        pause_s = min(1.5 * pause_s, LONGEST_LOOK_S)
    if here < needed:
        missing = ", ".join(name for name in enrolled if name not in members)
        names = f" Not heard: {missing}." if missing else ""
        raise FederationError(
            f"Expected at least federation.min_sites={needed} sites within {allowed_s:.0f} s, {here} connected.{names} "
            "Start the sites, then resume."
        )
    return members


def _connected(link: Link) -> int:
    return len(list(patiently(link.grid.get_node_ids)))


def greet(link: Link, config: Config, run_id: str, known: Mapping[str, Member]) -> Roster:
    """Ask every node that is not yet known who it is, and return all members by name, sorted.

    A node that does not answer, speaks another protocol, reads the proposal otherwise, declares nonsense or takes a
    known name is left out, with the reason; it is asked again next round.
    """
    known_nodes = {member.node_id for member in known.values()}
    present = set(patiently(link.grid.get_node_ids))
    members = {name: member for name, member in known.items() if member.node_id in present}
    left_out: dict[str, str] = {}
    new = sorted(present - known_nodes)
    requests = {node_id: Request(Kind.HELLO, run_id, 0, config.proposal(), hello_settings()) for node_id in new}
    for answer in ask(link, requests, config.federation.connect_timeout_s):
        member = _member(config, answer)
        if isinstance(member, Member) and member.name in members:
            member = f"its name, {member.name}, is taken: one site, one node"
        if isinstance(member, Member):
            members[member.name] = member
        else:
            left_out[link.nodes.get(answer.node_id, f"node {answer.node_id}")] = member
    return Roster(dict(sorted(members.items())), left_out)


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
