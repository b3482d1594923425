"""Lower bounds on epsilon from attacks: what an adversary managed to tell proves that a mechanism leaks that much.

An audit cannot prove privacy. It can only refute a statement, and here with a stated error rate: if the mechanism is
(epsilon, delta)-DP, each bound below is at most epsilon in all but `1 - confidence` of all audits, whatever the scores
are. Out of scope: the attacks that produce the scores (tests/statistical), the accounting (common/privacy).
"""

import functools
import math
from collections.abc import Callable
from typing import cast

import numpy as np
from jaxtyping import Bool, Float64
from numpy.typing import NDArray
from scipy import optimize, stats

_LARGEST = 100.0  # no number of guesses that anybody makes proves more
_CHOOSING = 10  # one run in so many chooses the threshold: a guess that is off costs less than runs that do not count

_Scores = Float64[np.ndarray, " runs"]
_Rates = Float64[np.ndarray, " thresholds"]
_Bound = Callable[[_Rates, _Rates], _Rates]


def correct_guesses(scores: Float64[np.ndarray, " canaries"], included: Bool[np.ndarray, " canaries"], r: int) -> int:
    """Guess that the r/2 highest scores are canaries that were in, the r/2 lowest that were out; count what is right.

    Args:
        scores: High where a canary looks included.
        included: The coins.
        r: How many guesses; fixed before anybody looks at the scores.

    Raises:
        ValueError: r is odd or more than the canaries.
    """
    if r % 2 or not 0 <= r <= len(scores):
        raise ValueError(f"Expected r={r} even and in [0, {len(scores)}].")
    order = np.argsort(scores, kind="stable")
    return int((~included[order[: r // 2]]).sum() + included[order[len(order) - r // 2 :]].sum())


def one_run_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Bound the chance of at least `v` correct guesses, if the mechanism is (epsilon, delta)-DP.

    Args:
        m: Canaries, each included by a fair coin of its own.
        r: Guesses; the auditor may abstain on the rest.
        v: Correct guesses.
        epsilon: Of the statement under test, with respect to adding or removing one canary.
        delta: Of the same statement.

    Raises:
        ValueError: Not 0 <= v <= r <= m.

    Source: Steinke, Nasr and Jagielski 2023 (arXiv:2305.08846), theorem 5.2 and appendix D.
    """
    if not 0 <= v <= r <= m:
        raise ValueError(f"Expected 0 <= v <= r <= m, got v={v}, r={r}, m={m}.")
    right = 1 / (1 + math.exp(-epsilon))
    within = np.cumsum(stats.binom.pmf(np.arange(v - 1, -1, -1), r, right))  # P[v > W >= v - i] for i = 1 ... v
    alpha = float(np.max(within / np.arange(1, v + 1), initial=0.0))
    return min(1.0, float(stats.binom.sf(v - 1, r, right)) + 2 * m * delta * alpha)


def one_run_epsilon(m: int, r: int, v: int, delta: float, confidence: float = 0.95) -> float:
    """Return the largest epsilon (to 1e-6) that the guesses of a one-run audit refute.

    One training run is enough, for its m canaries are independent experiments. The price: however little noise there
    is, r guesses prove at most about log(r/3).

    Args:
        m: Canaries, each included by a fair coin of its own.
        r: Guesses.
        v: Correct guesses.
        delta: Of the guarantee under test.
        confidence: That the result is at most the true epsilon.

    Raises:
        ValueError: Not 0 <= v <= r <= m.

    Guarantees:
        - coverage: Under randomised response, whose epsilon is known, the bound exceeds the truth in at most
          `1 - confidence` of the audits, and reaches most of it where guesses are many.

    Source: As `one_run_p_value`.
    """

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(m, r, v, epsilon, delta) < 1 - confidence

    low, high = 0.0, _LARGEST
    if not refuted(low):
        return 0.0
    while high - low > 1e-6:  # both ends keep their meaning whether or not the p-value is monotone
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def neighbour_epsilon(
    with_patient: Float64[np.ndarray, " runs"],
    without: Float64[np.ndarray, " other_runs"],
    delta: float,
    confidence: float = 0.95,
) -> float:
    """Bound epsilon from the scores of many runs with a patient and many without. Assumes nothing of the mechanism.

    The threshold is chosen on the first tenth of the runs; the rest are judged by it.

    Args:
        with_patient: Scores of independent runs on one data set; high where the patient looks included.
        without: Scores of independent runs on the same data without the patient.
        delta: Of the guarantee under test.
        confidence: That the result is at most the true epsilon.

    Returns:
        At least 0. However little noise there is, n judged runs on each side prove at most about log(n/3.7).

    Raises:
        ValueError: There are less than two runs on a side.

    Guarantees:
        - coverage: As in `one_run_epsilon`.

    Source: Jagielski et al. 2020 (arXiv:2006.07709) and Nasr et al. 2021 (arXiv:2101.04535): hypothesis tests with
        Clopper-Pearson intervals; Kairouz et al. 2015 (arXiv:1311.0776) for the region of errors.
    """
    return _bound(with_patient, without, confidence, functools.partial(epsilon_of_errors, delta=delta))


def neighbour_mu(
    with_patient: Float64[np.ndarray, " runs"], without: Float64[np.ndarray, " other_runs"], confidence: float = 0.95
) -> float:
    """Bound mu from the same scores: with a lower one the mechanism is not mu-GDP.

    mu-GDP: no easier to attack than one normal number that the patient shifts by mu standard deviations. That mu is
    refuted without any assumption. To turn it into an epsilon (`epsilon_of_mu`) proves more with far fewer runs than
    `neighbour_epsilon` can, but assumes that errors of other thresholds lie on the same normal curve. This is exact for
    Gaussian steps on all patients, where mu = sqrt(steps) / noise_multiplier; with Poisson sampling it is a limit for
    many steps; of a broken mechanism it is a guess.

    Args:
        with_patient: Scores of independent runs on one data set; high where the patient looks included.
        without: Scores of independent runs on the same data without the patient.
        confidence: That the result is at most the true mu.

    Returns:
        At least 0.

    Raises:
        ValueError: There are less than two runs on a side.

    Guarantees:
        - coverage: With normal scores a known mu apart the bound exceeds mu in at most `1 - confidence` of the audits,
          and reaches most of it where runs are many.

    Source: Nasr et al. 2023 (arXiv:2302.07956), section 4; Dong, Roth and Su 2022 (arXiv:1905.02383).
    """
    return _bound(with_patient, without, confidence, mu_of_errors)


def epsilon_of_errors(false_positive: _Rates, false_negative: _Rates, delta: float) -> _Rates:
    """Return the least epsilon with which an attack of these error rates is compatible; may be below 0.

    Source: Kairouz et al. 2015 (arXiv:1311.0776), theorem 2.1.
    """
    with np.errstate(divide="ignore"):
        one = np.log(np.maximum(1 - false_negative - delta, 0) / false_positive)
        other = np.log(np.maximum(1 - false_positive - delta, 0) / false_negative)
    return np.maximum(one, other)


def mu_of_errors(false_positive: _Rates, false_negative: _Rates) -> _Rates:
    """Return the mu of the normal shift at which the best attack has these error rates.

    Source: Dong, Roth and Su 2022 (arXiv:1905.02383), definition 2.6.
    """
    return -stats.norm.ppf(false_positive) - stats.norm.ppf(false_negative)


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Return the epsilon at which a mu-GDP mechanism is (epsilon, delta)-DP.

    Source: Balle and Wang 2018 (arXiv:1805.06530), theorem 8; Dong, Roth and Su 2022, corollary 2.13.
    """

    def excess(epsilon: float) -> float:
        first = stats.norm.cdf(mu / 2 - epsilon / mu)
        return float(first - math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))) - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    highest = mu * mu / 2 + 40 * mu  # 40 standard deviations above the mean of the privacy loss
    return float(cast(float, optimize.brentq(excess, 0.0, highest)))


def _bound(with_patient: _Scores, without: _Scores, confidence: float, bound: _Bound) -> float:
    cuts = [-(-len(scores) // _CHOOSING) for scores in (with_patient, without)]
    if min(len(with_patient) - cuts[0], len(without) - cuts[1]) < 1:
        raise ValueError(
            f"Expected at least 2 runs on each side, got {len(with_patient)} and {len(without)}; run more."
        )
    chosen, judged = (with_patient[: cuts[0]], without[: cuts[1]]), (with_patient[cuts[0] :], without[cuts[1] :])
    scores = np.unique(np.concatenate(chosen))  # in order
    thresholds = np.append(scores[:1], (scores[1:] + scores[:-1]) / 2)
    best = thresholds[np.argmax(bound(*_error_bounds(*chosen, thresholds, confidence)))]
    return max(0.0, float(bound(*_error_bounds(*judged, np.array([best]), confidence))[0]))


def _error_bounds(
    with_patient: _Scores, without: _Scores, thresholds: _Rates, confidence: float
) -> tuple[_Rates, _Rates]:
    """Bound the rates of false positives and false negatives from above, both at once with `confidence`.

    Source: Clopper and Pearson 1934, one-sided, each at half the error.
    """
    false_positives = len(without) - np.searchsorted(np.sort(without), thresholds, side="left")
    false_negatives = np.searchsorted(np.sort(with_patient), thresholds, side="left")
    return _at_most(false_positives, len(without), confidence), _at_most(false_negatives, len(with_patient), confidence)


def _at_most(errors: NDArray[np.int64], runs: int, confidence: float) -> _Rates:
    bound = stats.beta.ppf((1 + confidence) / 2, errors + 1, np.maximum(runs - errors, 1))
    return np.where(errors == runs, 1.0, bound)
