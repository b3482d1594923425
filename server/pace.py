"""How long the rest of a run will take, and times, sizes and epsilons in words.

Apart from the display, whose imports take seconds. Out of scope: how long a round waits (server/deadline).
"""

import math
from collections.abc import Sequence

from server.records import RoundRecord

PACE_ROUNDS = 5
"""So many rounds, the newest, tell the pace."""
_HUGE = 1e9
_FEW_BYTES = 99_950
"""Below, two decimals of a megabyte would say little."""


def seconds_left(records: Sequence[RoundRecord], refinements: int, rounds: int) -> float:
    """Return how long the rounds that are left will take; 0 where nothing tells it, or none is left.

    Args:
        records: The run's rounds up to now.
        refinements: Rounds up to this one are the warm-up, another kind of work: their time tells nothing.
        rounds: The run's last.
    """
    pace = [record.seconds for record in records if record.round > refinements and not record.lost][-PACE_ROUNDS:]
    left = rounds - records[-1].round if records else 0
    return left * sum(pace) / len(pace) if pace and left > 0 else 0.0


def amount(size: int) -> str:
    """Write bytes for a person: megabytes, below a tenth of one kilobytes.

    >>> amount(2_224_084), amount(99_940), amount(640), amount(0)
    ('2.22 MB', '99.9 kB', '0.6 kB', '0 kB')
    """
    if size >= _FEW_BYTES:
        return f"{size / 1e6:.2f} MB"
    return f"{size / 1e3:.1f} kB" if size else "0 kB"


def round_up(value: float, digits: int = 2) -> str:
    """Write an epsilon so that the text never states less than the value."""
    if not value < _HUGE:
        return f"{value:g}"
    return f"{math.ceil(round(value * 10**digits, 6)) / 10**digits:.{digits}f}"
