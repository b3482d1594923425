"""Who takes part: the sites that answered the greeting, with the plan that follows from what they declared."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from common.config import Config
from common.errors import ConfigError, FederationError, WireError
from common.greeting import Greeting, hello_settings, parse_greeting
from common.messages import Kind, Request
from common.plan import Plan, plan
from server.exchange import POLL_S, Answer, Link, ask
from server.handshake import other_proposal, other_protocol


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


def gather(link: Link, config: Config, run_id: str, known: Roster | None) -> Roster:
    """Return who is here; wait for sites at the start, and whenever fewer than there must be are left.

    A round that asks nobody is no attempt at it: a line that is cut for a minute must not end a run.

    Args:
        link: The way to the sites.
        config: The run's configuration.
        run_id: The run.
        known: Who was greeted so far; None at the start.

    Raises:
        FederationError: Too few came in `federation.connect_timeout_s`.
    """
    roster = Roster({}, {}) if known is None else greet(link, config, run_id, known.members)
    if known is None or len(roster.members) < config.federation.min_sites:
        wait_for_sites(link, config)
        roster = greet(link, config, run_id, roster.members)
    return roster


def wait_for_sites(link: Link, config: Config) -> None:
    """Wait until all expected sites are connected, or as many as there must be when the time is over.

    Expected are all enrolled sites, or within one machine `simulation.sites`.

    Raises:
        FederationError: Fewer than `federation.min_sites` connected in `federation.connect_timeout_s`.
    """
    deadline = time.monotonic() + config.federation.connect_timeout_s
    expected = config.simulation.sites if link.trust is None else len(link.trust.sites)
    while len(list(link.grid.get_node_ids())) < expected and time.monotonic() < deadline:
        time.sleep(POLL_S)
    connected = len(list(link.grid.get_node_ids()))
    if connected < config.federation.min_sites:
        raise FederationError(
            f"Expected at least federation.min_sites={config.federation.min_sites} sites within "
            f"{config.federation.connect_timeout_s:.0f} s, {connected} connected. Start the sites, then resume."
        )


def greet(link: Link, config: Config, run_id: str, known: Mapping[str, Member]) -> Roster:
    """Ask every node that is not yet known who it is, and return all members by name, sorted.

    A node that does not answer, speaks another protocol, reads the proposal otherwise, declares nonsense or takes a
    known name is left out, with the reason; it is asked again next round.
    """
    known_nodes = {member.node_id for member in known.values()}
    present = set(link.grid.get_node_ids())
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
