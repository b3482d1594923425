"""Robust combinations of updates, by Flower's own code. They see every update, so none works under secure aggregation.

Flower's functions are internal: this module is their one door, and tests/contracts pins what they mean.
"""

from collections.abc import Sequence

from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg

from common.config import ROBUST_MINIMUM
from common.errors import FederationError
from common.messages import Arrays
from server.aggregation import NamedArrays

TRIMMED_SHARE = 0.2
"""Part of the updates cut at each end of every coordinate."""


def combine(rule: str, updates: Sequence[Arrays]) -> NamedArrays:
    """Combine updates so that a minority cannot move the result at will.

    Args:
        rule: `median`, `trimmed-mean` (a fifth at each end) or `krum` (one outlier tolerated).
        updates: One a site; the same names and shapes.

    Returns:
        The combined weights. Weights of sites play no part: a size is a claim, and a robust rule trusts none.

    Raises:
        FederationError: Too few updates for the rule to outvote anybody.
    """
    needed = ROBUST_MINIMUM[rule]
    if len(updates) < needed:
        raise FederationError(f"Expected at least {needed} updates for {rule}, got {len(updates)}. Use mean instead.")
    names = sorted(updates[0])
    results = [([update[name] for name in names], 1) for update in updates]
    if rule == "median":
        combined = aggregate_median(results)
    elif rule == "trimmed-mean":
        combined = aggregate_trimmed_avg(results, TRIMMED_SHARE)
    else:
        combined = aggregate_krum(results, num_malicious=1, to_keep=0)
    return dict(zip(names, combined, strict=True))
