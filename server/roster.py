"""Who takes part: the sites that answered the greeting, with the plan that follows from what they declared."""

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import final

from common.config import Config
from common.errors import ConfigError, FederationError
from common.messages import PROTOCOL_VERSION, Kind, Reply, Request
from common.plan import Plan, plan
from server.exchange import POLL_S, Link, ask, patiently
from server.records import Waiting

MAX_DECLARED_PATIENTS = 100_000_000
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


def gather(
    link: Link, config: Config, run_id: str, known: Mapping[str, Member] | None
) -> Generator[Waiting, None, dict[str, Member]]:
    """Return who is here; wait for sites at the start, and whenever fewer than there must be are left.

    A round that asks nobody is no attempt at it: a line that is cut for a minute must not end a run.

    Args:
        link: The way to the sites.
        config: The run's configuration.
        run_id: The run.
        known: The members so far; None at the start.

    Yields:
        For whom it waits, at each change.

    Raises:
        FederationError: Too few came in `federation.connect_timeout_s`.
    """
    members = {} if known is None else greet(link, config, run_id, known)
    if known is None or len(members) < config.federation.min_sites:
        members = yield from wait_for_sites(link, config, run_id, members)
        members = greet(link, config, run_id, members)
    return members


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
            members = greet(link, config, run_id, members)
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


def greet(link: Link, config: Config, run_id: str, known: Mapping[str, Member]) -> dict[str, Member]:
    """Ask every node that is not yet known who it is, and return all members by name, sorted.

    A node that does not answer, declares nonsense or takes a known name is left out; it is asked again next round.
    """
    known_nodes = {member.node_id for member in known.values()}
    present = set(patiently(link.grid.get_node_ids))
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
