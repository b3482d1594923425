"""Whether enough sites are left for a round, seen before anybody is asked what costs budget.

A greeting costs nothing, a release does: while the sites that refuse for good leave fewer than a round needs, nobody is
asked for one. Out of scope: greeting (server/roster), how a site comes to its verdict (client/hello).
"""

import time
from collections.abc import Container, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from common.config import Config
from common.errors import FederationError, RefusalCode
from common.greeting import Greeting, Verdict
from server.checkpoint import State
from server.cohort import Declared, least_sites, planned_cohort, stored_cohort
from server.exchange import PERMANENT, POLL_S, Link
from server.handshake import Handshake, Met, advice, all_refuse, few_remain, listed, meet
from server.records import Failed, RoundRecord, Waiting
from server.roster import LONGEST_LOOK_S, Roster, gather
from server.rounds import Heard, make_record


@final
@dataclass(frozen=True)
class Quorum:
    """Who is there for a round.

    Attributes:
        link: The way to them, with the keys of whoever is enrolled by now.
        roster: All who were greeted.
        cohort: With secure-sum who takes part, or would, were it fixed now; else empty.
        least: So many sites must answer.
        over: Where too many refuse for good, what is told of the round, which nobody was asked for; else None.
    """

    link: Link
    roster: Roster
    cohort: Declared
    least: int
    over: Failed | None = None


def settle(
    link: Link, met: Met, roster: Roster, state: State | None, records: Sequence[RoundRecord]
) -> Generator[Waiting | Handshake, None, Quorum]:
    """Return who is there for the next round, once enough can answer it or it is clear that they never will.

    Whoever refuses is greeted anew first: an import or another budget may have come meanwhile.

    Args:
        link: The way to the sites.
        met: What is known of the sites; changed.
        roster: Who was greeted.
        state: Before the round; None before the first.
        records: The rounds that are real.

    Yields:
        What sites say that is new, and for whom is waited.

    Raises:
        FederationError: Those that may still come did not, in `federation.connect_timeout_s`.
        PolicyRefusal: Too many refuse, and nothing was learned yet: there is nothing to end well with.

    Guarantees:
        - nobody_pays_for_a_round_that_cannot_be: While fewer sites than needed have not refused, none is asked.
    """
    config, began = met.config, time.monotonic()
    fixed = stored_cohort(met.folder) if state is None else state.cohort
    fresh, pause_s, shown = not met.sites and not met.left_out, POLL_S, -1
    while True:
        yield from meet(met, roster.greetings, roster.left_out, begun=state is not None)
        cohort = fixed or planned_cohort(config, roster.members)
        quorum = Quorum(link, roster, cohort, least_sites(config, cohort))
        codes = _refusals(config, roster, records)
        able = _able(roster, fixed, codes)
        if len(able) >= quorum.least:
            return quorum
        if fresh:
            record = _unasked(state, codes)
            if (over := ending(link, config, state, replace(quorum, cohort=fixed), record)) is not None:
                return replace(quorum, over=over)
            left_s = began + config.federation.connect_timeout_s - time.monotonic()
            if left_s <= 0:
                raise FederationError(_not_heard(link, config, quorum, codes, len(able)))
            if len(able) != shown:
                shown, pause_s = len(able), POLL_S
                expected = left_of(link, config, fixed, roster.members, codes)
                yield Waiting(shown, expected, quorum.least, _missing(link, roster), left_s)
            time.sleep(min(pause_s, left_s))
            pause_s = min(1.5 * pause_s, LONGEST_LOOK_S)
        others = {name: roster.members[name] for name in sorted(able)}
        known = replace(roster, members=others, left_out={})
        (link, roster), fresh = (yield from gather(link, config, met.folder.run_id, known)), True


def ending(link: Link, config: Config, state: State | None, quorum: Quorum, record: RoundRecord) -> Failed | None:
    """Return what is told of a round that never will be heard by enough sites, which ends the run; else None.

    Args:
        link: The way to the sites.
        config: The run's configuration.
        state: Before the round; None before the first.
        quorum: Who was there for it.
        record: What it heard, or would hear.

    Raises:
        PolicyRefusal: Nothing was learned yet, so there is nothing to end well with; or an import or a policy can still
            be mended, and the run resumed.
    """
    codes = {name: code for name, code in record.refused.items() if code in PERMANENT}
    left = left_of(link, config, quorum.cohort, quorum.roster.members, codes)
    nobody = not record.sites and codes.keys() >= quorum.roster.members.keys()
    if not codes or not (nobody or left < quorum.least):
        return None
    spent = set(codes.values()) == {RefusalCode.OVER_BUDGET.value}
    if state is None or not (nobody or spent):
        raise all_refuse(codes) if nobody else few_remain(codes, left, quorum.least)
    return Failed(record, quorum.least, 1, 1)


def left_of(link: Link, config: Config, cohort: Declared, here: Iterable[str], refused: Container[str]) -> int:
    """Return how many sites have not refused for good: those that are here, and those that may still come.

    Args:
        link: The way to the sites.
        config: The run's configuration.
        cohort: Of a run with secure-sum, once it is fixed; else empty.
        here: The sites that were greeted.
        refused: Those that refuse for good.
    """
    enrolled = () if link.trust is None else link.trust.sites
    names = set(cohort) or {*enrolled, *here}
    unnamed = 0 if cohort or enrolled else max(0, config.simulation.sites - len(names))
    return sum(name not in refused for name in names) + unnamed


def _able(roster: Roster, cohort: Declared, codes: Mapping[str, str]) -> set[str]:
    """Return who is here and will answer, as far as a greeting tells."""
    return {
        name
        for name, said in roster.greetings.items()
        if name not in codes
        and said.verdict is not Verdict.BAD_REQUEST
        and (not cohort or cohort.get(name) == said.declared_patients)
    }


def _unasked(state: State | None, codes: Mapping[str, str]) -> RoundRecord:
    number = 0 if state is None else state.round + 1
    return make_record(number, Heard(refused=dict(codes)), None, 0.0, time.monotonic())


def _refusals(config: Config, roster: Roster, records: Sequence[RoundRecord]) -> dict[str, str]:
    """Return the codes of the sites that will refuse the next round for good, by what they said."""
    return {
        name: said.verdict.value
        for name, said in roster.greetings.items()
        if said.verdict.value in PERMANENT
        and (said.verdict is not Verdict.OVER_BUDGET or _is_spent(config, said, records))
    }


def _is_spent(config: Config, said: Greeting, records: Sequence[RoundRecord]) -> bool:
    """Tell whether all that a site's budget allows of the run was given.

    A site that cannot pay for the warm-up may still pay for rounds of training, which cost less: its greeting counts
    none of them.
    """
    warmup = config.refinements + 1 if config.warmup.share > 0 else 0
    if len(records) >= warmup > said.rounds_allowed or said.rounds_allowed > len(records):
        return False
    return said.rounds_allowed <= sum(said.site in record.sites for record in records)


def _missing(link: Link, roster: Roster) -> tuple[str, ...]:
    return () if link.trust is None else tuple(sorted(link.trust.sites.keys() - roster.members.keys()))


def _not_heard(link: Link, config: Config, quorum: Quorum, codes: Mapping[str, str], able: int) -> str:
    why = listed({**quorum.roster.left_out, **codes})
    missing = ", ".join(_missing(link, quorum.roster))
    return (
        f"Expected at least {quorum.least} sites that join within {config.federation.connect_timeout_s:.0f} s, "
        f"got {able}"
        f"{f' ({why})' if why else ''}.{f' Not heard: {missing}.' if missing else ''} {advice(codes.values())}"
        "Start the sites, then resume."
    )
