"""Rounds that are given up: the sites answered them before, to another question, and those answers are lost.

So it is when a run goes on from an older checkpoint than its last: a round is averaged anew, perhaps of other sites,
and the questions after it differ from those that were answered. A site answers one question a round, whatever happens,
so that no further attempt can hear it. Its charge is spent; the run goes on with the next round.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from common.config import Config
from common.errors import FederationError, RefusalCode
from server.checkpoint import State
from server.cohort import least_sites
from server.records import RoundRecord
from server.rounds import Outcome

LOST_IN_A_ROW = 3
"""More than that no crash costs, as the last three checkpoints are kept: then a site says what is not so."""


def give_up(config: Config, state: State | None, record: RoundRecord) -> Outcome:
    """Return the outcome of a round that heard too few: as it is, or where no attempt can hear enough, given up.

    Args:
        config: The run's configuration.
        state: Before the round; None before the first.
        record: What the round heard.

    Raises:
        FederationError: It is the run's first: nothing was learned, so there is nothing to go on with.
    """
    least = config.federation.min_sites if state is None else least_sites(config, state.cohort)
    replayed = [name for name, code in record.refused.items() if code == RefusalCode.REPLAYED]
    others = len(record.sites) + len(record.refused) - len(replayed)
    if not replayed or others >= least:
        return None, record
    if state is None:
        raise FederationError(
            f"Round {record.round} was answered before, to another question ({_codes(record)}), and the answers are "
            "lost. Nothing was learned of them yet: start a new run."
        )
    kept = state.warmup if record.round < config.refinements else ()
    return replace(state, round=record.round, warmup=kept), replace(record, lost=True)


def check_lost(records: Sequence[RoundRecord]) -> None:
    """Let no run go on that only costs the sites that answer.

    Args:
        records: The rounds of this attempt at the run, the newest last.

    Raises:
        FederationError: The last LOST_IN_A_ROW of them were given up, each with an answer that was charged for nothing.
    """
    in_vain = list(takewhile(lambda record: record.lost and record.sites, reversed(records)))
    if len(in_vain) >= LOST_IN_A_ROW:
        raise FederationError(
            f"Rounds {in_vain[-1].round} to {in_vain[0].round} were given up ({_codes(in_vain[0])}) and cost the other "
            f"sites their budget. No crash costs more than {LOST_IN_A_ROW} rounds: ask the sites that say replayed, or "
            "`revoke` them; then resume the run."
        )


def _codes(record: RoundRecord) -> str:
    return ", ".join(f"{name}: {code}" for name, code in record.refused.items())
