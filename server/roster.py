"""Who takes part: the sites that answered the greeting, with the plan that follows from what they declared."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from common.config import Config
from common.errors import ConfigError, FederationError
from common.messages import PROTOCOL_VERSION, Kind, Reply, Request
from common.plan import Plan, plan
from server.exchange import POLL_S, Link, ask

MAX_DECLARED_PATIENTS = 100_000_000


@final
@dataclass(frozen=True)
class Member:
    """A site in the federation."""

    name: str
    node_id: int
    declared_patients: int
    plan: Plan


def gather(link: Link, config: Config, run_id: str, known: Mapping[str, Member] | None) -> dict[str, Member]:
    """Return who is here; wait for sites at the start, and whenever fewer than there must be are left.

    A round that asks nobody is no attempt at it: a line that is cut for a minute must not end a run.

    Args:
        link: The way to the sites.
        config: The run's configuration.
        run_id: The run.
        known: The members so far; None at the start.

    Raises:
        FederationError: Too few came in `federation.connect_timeout_s`.
    """
    members = {} if known is None else greet(link, config, run_id, known)
    if known is None or len(members) < config.federation.min_sites:
        wait_for_sites(link, config)
        members = greet(link, config, run_id, members)
    return members


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


def greet(link: Link, config: Config, run_id: str, known: Mapping[str, Member]) -> dict[str, Member]:
    """Ask every node that is not yet known who it is, and return all members by name, sorted.

    A node that does not answer, declares nonsense or takes a known name is left out; it is asked again next round.
    """
    known_nodes = {member.node_id for member in known.values()}
    present = set(link.grid.get_node_ids())
    members = {name: member for name, member in known.items() if member.node_id in present}
    new = sorted(present - known_nodes)
    requests = {node_id: Request(Kind.HELLO, run_id, 0, config.proposal()) for node_id in new}
    for answer in ask(link, requests, config.federation.connect_timeout_s):
        member = _member(config, answer.node_id, answer.reply) if answer.reply else None
        if member is not None and member.name not in members:
            members[member.name] = member
    return dict(sorted(members.items()))


def _member(config: Config, node_id: int, reply: Reply) -> Member | None:
    name, declared = reply.fields.get("site"), reply.fields.get("declared_patients")
    if reply.arrays or reply.fields.get("protocol") != PROTOCOL_VERSION:
        return None
    if not isinstance(name, str) or not isinstance(declared, int) or not 0 < declared <= MAX_DECLARED_PATIENTS:
        return None
    try:
        return Member(name, node_id, declared, plan(config, declared))
    except ConfigError:
        return None
