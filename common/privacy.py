"""What a run costs a patient in (epsilon, delta), and how much noise buys a given cost.

Unit: one patient. Relation: add or remove all images of that patient. The only module that imports `dp_accounting`.
Out of scope: what a run does (common/plan), what was spent so far (client/ledger), the noise itself (common/noise).
"""

import functools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import dp_accounting
from dp_accounting import rdp
from dp_accounting.pld import privacy_loss_distribution as pld

from common.errors import ConfigError

MAX_STEPS = 500_000

_MAX_SPREAD = 15.0  # of the composed privacy loss: epsilon is over 100 there, and the grid of the PLD would be huge
_PLD_MIN_DELTA = 1e-12  # below, rounding in the FFT of the PLD is no longer small against delta
_FINE, _COARSE = 64.0, 16.0  # grid points in one standard deviation of a step's privacy loss
_MAX_GRID = 250_000.0  # grid points in the privacy loss of one step
_WHOLE_ORDERS = [*range(2, 65), 80, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024]
_SMALL_RATE = 0.01  # up to here the series of the fractional Rényi orders converges
_DIGITS = 1000  # noise multipliers have four significant digits
_LOWEST, _HIGHEST = 0.05, 1e6


@final
@dataclass(frozen=True, order=True)
class Charge:
    """One homogeneous piece of a composition: Poisson-sampled Gaussian steps.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the clip norm of one patient.
        sample_rate: Probability of each patient in each step; 1.0 with one step is a plain Gaussian release.
        steps: How many steps; 0 costs nothing.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ConfigError(f"Expected noise_multiplier={self.noise_multiplier} above 0: no noise, no privacy.")
        if not 0 <= self.sample_rate <= 1:
            raise ConfigError(f"Expected sample_rate={self.sample_rate} in [0, 1].")
        if not 0 <= self.steps <= MAX_STEPS:
            raise ConfigError(f"Expected steps={self.steps} in [0, {MAX_STEPS}]; plan fewer rounds or steps.")


def epsilon(charges: Iterable[Charge], delta: float) -> float:
    """Compose everything charged and return its epsilon at `delta`, as an upper bound.

    Privacy loss distributions are rounded pessimistically. Where epsilon is over 100 or delta below 1e-12 the Rényi
    bound stands in, which is larger.

    Args:
        charges: Pieces in any order; an empty composition costs 0.
        delta: In (0, 1).

    Raises:
        ConfigError: delta is outside (0, 1).

    Guarantees:
        - order_does_not_matter: Equal (noise, rate) pieces are merged and sorted first.
        - upper_bound: Never below dp-accounting's PLD with a fine grid by more than 1e-3 of it.
        - monotone: More steps or a higher rate never cost less, more noise never costs more (to 1e-3 of epsilon).

    Source: Koskela et al. 2020; Doroshenko et al. 2022 (arXiv:2207.04380), "connect the dots".
    """
    return _epsilon(_merged(charges), _checked(delta), _FINE)


def epsilon_rdp(charges: Iterable[Charge], delta: float) -> float:
    """Return the Rényi bound on the same composition: a looser check by another method.

    Raises:
        ConfigError: delta is outside (0, 1).

    Source: Mironov 2017 (arXiv:1702.07476); Mironov et al. 2019 (arXiv:1908.10530).
    """
    return _rdp(_merged(charges), _checked(delta))


def noise_for(
    epsilon_target: float, delta: float, sample_rate: float, steps: int, before: Iterable[Charge] = ()
) -> float:
    """Find the smallest noise multiplier with which `steps` more steps stay within the target.

    Args:
        epsilon_target: Bound on the whole composition.
        delta: In (0, 1).
        sample_rate: Probability of each patient in each step.
        steps: At least 1.
        before: What is charged already.

    Returns:
        A number of four significant digits, rounded up.

    Raises:
        ConfigError: No noise multiplier in [0.05, 1e6] does it.

    Guarantees:
        - holds_exactly: `epsilon` of `before` and the new steps is at most the target, as this module computes it.
        - smallest: 0.2 % less noise costs more than the target.
    """
    return _noise_for(epsilon_target, _checked(delta), sample_rate, steps, _merged(before))


def affordable_rounds(
    before: Iterable[Charge], one_round: Charge, rounds: int, max_epsilon: float, delta: float
) -> int:
    """Count how many of a run's equal rounds fit into a budget, after what is charged already.

    Args:
        before: What is charged already.
        one_round: What each round costs.
        rounds: How many are planned.
        max_epsilon: Bound on the whole composition.
        delta: In (0, 1).

    Returns:
        A number in [0, rounds]; 0 when the budget is gone before the first.

    Raises:
        ConfigError: delta is outside (0, 1), or more is charged already than can be accounted for.

    Guarantees:
        - that_many_fit: `epsilon` of `before` and the counted rounds is at most the bound, as this module computes it,
          if any fits.
        - one_more_does_not: With one round more it exceeds the bound, unless all were counted or `MAX_STEPS` is
          reached.
    """
    spent = _merged(before)
    room = (MAX_STEPS - sum(piece.steps for piece in spent)) // max(1, one_round.steps)

    def exceeds(count: int) -> bool:
        charge = Charge(one_round.noise_multiplier, one_round.sample_rate, one_round.steps * count)
        return not epsilon((*spent, charge), delta) <= max_epsilon

    # whatever the rounding of the PLD does, bisection ends beside a count that exceeds the bound and at one that fits
    return bisect_left(range(min(rounds, room) + 1), True, lo=1, key=exceeds) - 1


def _checked(delta: float) -> float:
    if not 0 < delta < 1:
        raise ConfigError(f"Expected delta={delta} in (0, 1).")
    return delta


def _merged(charges: Iterable[Charge]) -> tuple[Charge, ...]:
    steps: Counter[tuple[float, float]] = Counter()
    for charge in charges:
        steps[charge.noise_multiplier, charge.sample_rate] += charge.steps
    total = sum(steps.values())
    if total > MAX_STEPS:
        raise ConfigError(f"Expected at most {MAX_STEPS} steps in all, got {total}; plan fewer rounds or steps.")
    return tuple(sorted(Charge(*key, count) for key, count in steps.items() if count and key[1]))


def _event(piece: Charge) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(piece.noise_multiplier)
    return gaussian if piece.sample_rate == 1.0 else dp_accounting.PoissonSampledDpEvent(piece.sample_rate, gaussian)


def _rdp(pieces: tuple[Charge, ...], delta: float) -> float:
    if not pieces:
        return 0.0
    converges = all(piece.sample_rate <= _SMALL_RATE or piece.sample_rate == 1.0 for piece in pieces)
    accountant = rdp.RdpAccountant(None if converges else _WHOLE_ORDERS)
    for piece in pieces:
        accountant.compose(_event(piece), piece.steps)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=4096)
def _epsilon(pieces: tuple[Charge, ...], delta: float, points: float) -> float:
    variance = sum(_releases(piece) * _spread(piece) ** 2 for piece in pieces)
    if not pieces or math.sqrt(variance) > _MAX_SPREAD or delta < _PLD_MIN_DELTA:
        return _rdp(pieces, delta)
    # Rounding to a grid of width h adds about h^2/12 to the variance of each release's loss. With h a fraction of the
    # root mean square loss, the sum is wrong by the same small part of itself, however many releases there are.
    interval = math.sqrt(variance / sum(map(_releases, pieces))) / points
    widest = max(10 / piece.noise_multiplier + 0.5 / piece.noise_multiplier**2 for piece in pieces)
    grid = _next_finer(max(interval, widest / _MAX_GRID))
    total = functools.reduce(pld.PrivacyLossDistribution.compose, (_losses(piece, grid) for piece in pieces))
    return float(total.get_epsilon_for_delta(delta))


def _losses(piece: Charge, interval: float) -> pld.PrivacyLossDistribution:
    """Return the privacy loss of one piece; steps without sampling are together one Gaussian release."""
    if piece.sample_rate == 1.0:
        return _of_one_release(piece.noise_multiplier / math.sqrt(piece.steps), 1.0, interval)
    return _of_one_release(piece.noise_multiplier, piece.sample_rate, interval).self_compose(piece.steps)


@lru_cache(maxsize=32)
def _of_one_release(noise_multiplier: float, sample_rate: float, interval: float) -> pld.PrivacyLossDistribution:
    """Return the privacy loss of one release: most of the work, and the same for the many lengths of a run."""
    return pld.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=sample_rate,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _next_finer(interval: float) -> float:
    """Return the next smaller one of eight intervals in each factor of two, so that runs of many lengths share them."""
    return 2.0 ** (math.floor(8 * math.log2(interval)) / 8)


def _releases(piece: Charge) -> int:
    """Count the distributions to compose: steps without sampling are together one Gaussian release."""
    return 1 if piece.sample_rate == 1.0 else piece.steps


def _spread(piece: Charge) -> float:
    """Estimate the standard deviation of the privacy loss of one release."""
    sigma, rate = piece.noise_multiplier, piece.sample_rate
    if rate == 1.0:
        return math.sqrt(piece.steps) / sigma
    return min(rate * math.sqrt(math.expm1(min(sigma**-2, 700.0))), math.sqrt(rate) / sigma)


@lru_cache(maxsize=256)
def _noise_for(target: float, delta: float, sample_rate: float, steps: int, before: tuple[Charge, ...]) -> float:
    def affordable(index: int, points: float) -> bool:
        return _epsilon(_merged((*before, Charge(_grid(index), sample_rate, steps))), delta, points) <= target

    lowest, highest = _index(_LOWEST), _index(_HIGHEST)
    near = bisect_left(range(highest), True, lo=lowest, key=lambda index: affordable(index, _COARSE))
    low, high = max(lowest, near - 30), min(highest, near + 2)
    best = bisect_left(range(high), True, lo=low, key=lambda index: affordable(index, _FINE))
    if not affordable(best, _FINE):
        raise ConfigError(
            f"No noise multiplier in [{_LOWEST}, {_HIGHEST:g}] keeps {steps} steps with sample rate {sample_rate:g} "
            f"within epsilon = {target:g} at delta = {delta:g} after what is charged already. "
            "Raise privacy.epsilon or plan fewer rounds."
        )
    return _grid(best)


def _grid(index: int) -> float:
    """Return the noise multiplier at a place in the list of numbers with four significant digits, 0.01 first."""
    exponent, mantissa = divmod(index, 9 * _DIGITS)
    return float(f"{mantissa + _DIGITS}e{exponent - 5}")


def _index(noise_multiplier: float) -> int:
    exponent = math.floor(math.log10(noise_multiplier)) + 2
    return 9 * _DIGITS * exponent + round(noise_multiplier * 10.0 ** (5 - exponent)) - _DIGITS
