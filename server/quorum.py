"""Whether enough sites are left for a round, seen before anybody is asked what costs budget.

A greeting costs nothing, a release does: while the sites that refuse for good leave fewer than a round needs, nobody is
asked for one. Out of scope: greeting (server/roster), how a site comes to its verdict (client/hello).
"""

import time
from collections.abc import Generator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import final

from common.config import Config
from common.errors import FederationError, RefusalCode
from common.greeting import Greeting, Verdict, pays_for_warm_up
from server.checkpoint import State
from server.cohort import Declared, least_sites, planned_cohort, stored_cohort
from server.exchange import PERMANENT, POLL_S, Link
from server.handshake import Handshake, Met, advice, all_refuse, few_remain, listed, meet
from server.records import Failed, RoundRecord, Waiting
from server.roster import LONGEST_LOOK_S, Roster, gather, missing
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
        FederationError: Those that may still come did not, in `federation.connect_timeout_s`; or too many of the run's
            cohort were revoked.
        PolicyRefusal: Too many refuse, and nothing was learned yet, or what they refuse for can be mended.

    Guarantees:
        - nobody_pays_for_a_round_that_cannot_be: While fewer sites than needed are willing, by the newest word of each,
          none is asked.
        - who_is_away_is_waited_for: A run that has begun does not end well because its other sites are away.
    """
    config, fresh = met.config, not met.sites and not met.left_out
    began = met.began if fresh else time.monotonic()  # for the first look sites were waited for already
    fixed = stored_cohort(met.folder) if state is None else state.cohort
    newest = {} if fresh or not records else {n: c for n, c in records[-1].refused.items() if c in PERMANENT}
    pause_s, shown = POLL_S, -1
    while True:
        yield from meet(met, roster.greetings, roster.left_out)
        cohort = fixed or planned_cohort(config, roster.members)
        quorum = Quorum(link, roster, cohort, least_sites(config, cohort))
        codes = newest | _refusals(config, roster, records)
        unable = codes | _unable(roster, fixed)
        able = roster.members.keys() - unable.keys()
        if len(able) >= quorum.least:
            return quorum
        if fresh:
            left_s = began + config.federation.connect_timeout_s - time.monotonic()
            if (over := _over(config, state, replace(quorum, cohort=fixed), codes, records, left_s)) is not None:
                return replace(quorum, over=over)
            _require_cohort(link, fixed, quorum.least)
            if left_s <= 0:
                raise FederationError(_not_heard(config, quorum, unable, len(able), missing(link, roster.members)))
            if len(able) != shown:
                shown, pause_s = len(able), POLL_S
                names = tuple(sorted({*missing(link, roster.members), *(unable.keys() - codes.keys())}))
                expected = shown + len(unable.keys() - codes.keys()) + _away(config, replace(quorum, cohort=fixed))
                yield Waiting(shown, expected, quorum.least, names, left_s)
            time.sleep(min(pause_s, left_s))
            pause_s = min(1.5 * pause_s, LONGEST_LOOK_S)
        known = replace(roster, members={name: roster.members[name] for name in sorted(able)}, left_out={})
        (link, roster), fresh, newest = (yield from gather(link, config, met.folder.run_id, known)), True, {}


def ending(
    config: Config, state: State | None, quorum: Quorum, record: RoundRecord, away: int | None = None
) -> Failed | None:
    """Return what is told of a round that never will be heard by enough sites, which ends the run; else None.

    Args:
        config: The run's configuration.
        state: Before the round; None before the first.
        quorum: Who was there for it.
        record: What it heard, or would hear.
        away: How many others may still come; None: who is enrolled, or of the cohort, and not here.

    Raises:
        PolicyRefusal: Nothing was learned yet, so there is nothing to end well with; or an import or a policy can still
            be mended, and the run resumed.
    """
    codes = {name: code for name, code in record.refused.items() if code in PERMANENT}
    left = len(_counted(quorum) - codes.keys()) + (_away(config, quorum) if away is None else away)
    if not codes or left >= quorum.least:
        return None
    if state is None or not _spent(codes):
        raise few_remain(codes, left, quorum.least) if left else all_refuse(codes)
    return Failed(record, quorum.least, 1, 1)


def _over(
    config: Config,
    state: State | None,
    quorum: Quorum,
    codes: Mapping[str, str],
    records: Sequence[RoundRecord],
    left_s: float,
) -> Failed | None:
    """Return the end of the run, if it is there: also where only sites are away that never took part in it.

    An enrolled site that takes no part must not keep a run whose budgets are spent from its results. For one that took
    part the run can be resumed.
    """
    record = _unasked(state, codes)
    over = ending(config, state, quorum, record)
    if over is not None or left_s > 0 or state is None or not _spent(codes):
        return over
    took_part = {name for one in records for name in one.sites}
    return ending(
        config, state, quorum, record, len((took_part & _enrolled(quorum.link)) - quorum.roster.members.keys())
    )


def _spent(codes: Mapping[str, str]) -> bool:
    return set(codes.values()) == {RefusalCode.OVER_BUDGET.value}


def _enrolled(link: Link) -> AbstractSet[str]:
    return frozenset() if link.trust is None else link.trust.sites.keys()


def _counted(quorum: Quorum) -> set[str]:
    """Return who is here and counts: with a cohort nobody else, and nobody who was revoked."""
    here = set(quorum.roster.members)
    if quorum.cohort:
        here &= quorum.cohort.keys()
    return here if quorum.link.trust is None else here & _enrolled(quorum.link)


def _away(config: Config, quorum: Quorum) -> int:
    """Return how many sites are not here and may still come: of those that are enrolled, or of the cohort."""
    here, cohort = quorum.roster.members.keys(), quorum.cohort.keys()
    if quorum.link.trust is not None:
        return len(((cohort & _enrolled(quorum.link)) if cohort else _enrolled(quorum.link)) - here)
    return len(cohort - here) if cohort else max(0, config.simulation.sites - len(here))


def _require_cohort(link: Link, cohort: Declared, least: int) -> None:
    """Refuse to wait for a cohort of which too many were put out: nobody else can take their parts of the noise.

    Raises:
        FederationError: Fewer than `least` of it are enrolled.
    """
    gone = () if link.trust is None else sorted(cohort.keys() - link.trust.sites.keys())
    if gone and len(cohort) - len(gone) < least:
        raise FederationError(
            f"Of the cohort that this run was fixed to, {', '.join(gone)} may no longer take part, and {least} of "
            f"{len(cohort)} are needed. Start a new run; or readmit who left (`enrol --readmit`), then resume."
        )


def _unable(roster: Roster, cohort: Declared) -> dict[str, str]:
    """Return who is here and will not answer, with the reason; who refuses for good is told elsewhere."""
    reasons: dict[str, str] = {}
    for name, said in roster.greetings.items():
        if said.verdict is Verdict.BAD_REQUEST:
            reasons[name] = "it cannot plan this run"
        elif cohort and name not in cohort:
            reasons[name] = "not in the cohort that this run was fixed to"
        elif cohort and cohort[name] != said.declared_patients:
            reasons[name] = f"declares {said.declared_patients} patients, the run is fixed to its {cohort[name]}"
    return reasons


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
    """Tell whether a site's budget gives no more of the run: not the warm-up under way, or all that it allows."""
    if not pays_for_warm_up(config, said):
        return len(records) < config.warmup_releases
    return said.rounds_allowed <= sum(said.site in record.sites for record in records)


def _not_heard(config: Config, quorum: Quorum, unable: Mapping[str, str], able: int, absent: Sequence[str]) -> str:
    why = listed({**quorum.roster.left_out, **unable})
    start = f"Not heard: {', '.join(absent)}. Start or `revoke` them, then resume." if absent else ""
    mend = "" if absent else "Mend these sites, then resume."
    return (
        f"Expected at least {quorum.least} sites that join within {config.federation.connect_timeout_s:.0f} s, "
        f"got {able}{f' ({why})' if why else ''}. {advice(unable.values())}{start}{mend}"
    )
