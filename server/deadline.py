"""How long a round waits for answers: as long as its rounds take and somewhat more, never over what the run states.

`federation.round_timeout_s` is the one setting. Everything else follows from the records of the rounds, so that a
resumed run waits as the one before it did. Out of scope: the waiting itself (server/exchange).
"""

from collections.abc import Sequence

from server.records import LATE, RoundRecord

FACTOR = 2.0
GRACE_S = 20.0
"""On top: what a relay, an agent or a connection takes that starts anew."""
LEARNED_FROM = 5
"""So many rounds of one kind, the newest, tell how long the next one takes."""
FIRST_ROUNDS = 2
"""So many rounds of one kind wait as long as the run states."""


def round_deadline_s(longest_s: float, refinements: int, records: Sequence[RoundRecord], attempt: int = 0) -> float:
    """Return how long the round after some records is to wait for answers.

    Args:
        longest_s: `federation.round_timeout_s`.
        refinements: Rounds up to this one are the warm-up, whose time tells nothing of the others'.
        records: All rounds up to now; empty before the first.
        attempt: How often the round under way was tried in vain.

    Returns:
        Seconds: `FACTOR` times the slowest answer of the last rounds of this kind, and `GRACE_S`; more where a site was
        late; the whole in the first rounds of a kind and after a failed attempt.

    Guarantees:
        - never_over_the_setting: At most `longest_s`, and more than 0.
        - in_time_again: More than twice the slowest answer of the last rounds, or `longest_s`.
        - nobody_starves: A site that answers within `longest_s` is heard again: after its 1st, 2nd, 4th, 8th ... late
          answer in a row the round waits twice that many times as long.
        - the_silent_cost_little: A site that never answers costs, over many rounds, at most five times the usual wait
          a round, however long `longest_s` is.
    """
    number = records[-1].round + 1 if records else 0
    alike = [record for record in records[-LEARNED_FROM:] if (record.round > refinements) == (number > refinements)]
    heard = [max(seconds) for record in alike if (seconds := [site.seconds for site in record.sites.values()])]
    if attempt or len(heard) < FIRST_ROUNDS:
        return longest_s
    usual_s = FACTOR * max(heard) + GRACE_S
    waits = [2 * times for times in _late_in_a_row(records) if times & (times - 1) == 0]
    return min(longest_s, usual_s * max(waits, default=1))


def _late_in_a_row(records: Sequence[RoundRecord]) -> list[int]:
    """Return for each site that was late in the newest round how many rounds in a row it has been."""
    late = [name for name, code in records[-1].refused.items() if code in LATE]
    return [_times(records, name) for name in late]


def _times(records: Sequence[RoundRecord], name: str) -> int:
    times = 0
    for record in reversed(records):
        if record.refused.get(name) not in LATE:
            break
        times += 1
    return times
