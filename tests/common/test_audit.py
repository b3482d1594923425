"""Bounds by hand, and how often they hold where the truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from common.audit import (
    correct_guesses,
    epsilon_of_errors,
    epsilon_of_mu,
    mu_of_errors,
    neighbour_epsilon,
    neighbour_mu,
    one_run_epsilon,
    one_run_p_value,
)
from common.privacy import Charge, epsilon


def logit(share):
    return math.log(share / (1 - share))


def test_guesses_are_the_extremes_and_the_rest_is_left_out():
    scores, included = np.array([0.1, 5.0, -3.0, 2.0, 0.2, -1.0]), np.array([True, True, False, False, True, False])
    assert [correct_guesses(scores, included, r) for r in (0, 2, 4, 6)] == [0, 2, 3, 4]
    assert correct_guesses(-scores, included, 2) == 0
    for r in (3, 8, -2):
        with pytest.raises(ValueError, match=f"r={r}"):
            correct_guesses(scores, included, r)


def test_p_value_by_hand():
    assert one_run_p_value(10, 10, 0, 0.0, 0.0) == 1
    assert one_run_p_value(3, 3, 3, 0.0, 0.0) == pytest.approx(1 / 8)
    assert one_run_p_value(3, 3, 2, math.log(3), 0.0) == pytest.approx(27 / 64 + 27 / 64)
    # of two: P[W = 2] = 1/4, alpha = max(P[W = 1], P[W <= 1] / 2) = 1/2
    assert one_run_p_value(2, 2, 2, 0.0, 0.1) == pytest.approx(1 / 4 + 2 * 2 * 0.1 / 2)
    assert one_run_p_value(7, 2, 2, 0.0, 0.01) == pytest.approx(1 / 4 + 2 * 7 * 0.01 / 2)
    # of three at 3/4: P[W = 3] = 27/64, alpha = max(27/64, 36/64 / 2, 37/64 / 3)
    assert one_run_p_value(3, 3, 3, math.log(3), 0.01) == pytest.approx(27 / 64 + 6 * 0.01 * 27 / 64)
    assert one_run_p_value(1000, 2, 2, 0.0, 0.1) == 1


@pytest.mark.parametrize(("m", "r", "v"), [(2, 3, 1), (3, 2, 3), (3, 2, -1)])
def test_more_guesses_than_canaries_or_more_right_than_guesses_are_refused(m, r, v):
    with pytest.raises(ValueError, match="v <= r <= m"):
        one_run_p_value(m, r, v, 1.0, 0.0)


def test_one_run_bound_by_hand():
    for r in (10, 100, 1000):  # all right: the accuracy a with a^r = 0.05
        assert one_run_epsilon(r, r, r, 0.0) == pytest.approx(logit(0.05 ** (1 / r)), abs=1e-5)
    assert one_run_epsilon(10, 10, 10, 0.0) == pytest.approx(1.0519, abs=1e-4)
    assert one_run_epsilon(1000, 1000, 500, 0.0) == 0  # half right
    assert one_run_epsilon(4, 4, 4, 0.0) == 0  # one in sixteen is not rare enough
    assert one_run_epsilon(100, 100, 90, 0.0) == pytest.approx(  # as Clopper and Pearson have it
        logit(stats.beta.ppf(0.05, 90, 11)), abs=1e-5
    )
    assert one_run_epsilon(100, 100, 90, 0.0, confidence=0.99) == pytest.approx(
        logit(stats.beta.ppf(0.01, 90, 11)), abs=1e-5
    )


def test_one_run_bound_with_delta_is_lower_and_abstaining_is_not_free():
    bounds = [one_run_epsilon(1000, 200, 180, delta) for delta in (0.0, 1e-5, 1e-4, 1e-2)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[2] > bounds[3] == 0
    assert one_run_epsilon(1000, 200, 180, 1e-4) < one_run_epsilon(200, 200, 180, 1e-4)


@pytest.mark.parametrize("truth", [0.5, 2.0, 4.0])
def test_coverage_of_one_run_under_randomised_response(truth):
    """Every coin is told rightly with probability e^epsilon / (1 + e^epsilon): what happens how often is known."""
    r, right = 300, 1 / (1 + math.exp(-truth))
    correct = np.arange(r + 1)
    chances = stats.binom.pmf(correct, r, right)

    def coverage(bounds):
        return chances[bounds <= truth].sum()

    bounds = np.array([one_run_epsilon(r, r, v, 0.0) for v in correct])
    assert 0.95 <= coverage(bounds) <= 0.98
    assert (chances * bounds).sum() > truth - 1.0  # not vacuous
    naive = np.array([logit((v + 1e-9) / (r + 2e-9)) for v in correct])
    assert coverage(naive) < 0.7


def test_coverage_of_one_run_with_delta():
    """Some canaries are published outright: with probability delta each, and the bound still holds."""
    m, delta, truth, runs = 200, 0.005, 1.0, 2000
    rng = np.random.default_rng(0)
    right = rng.binomial(m, delta + (1 - delta) / (1 + math.exp(-truth)), runs)
    bounds = {v: one_run_epsilon(m, m, v, delta) for v in np.unique(right).tolist()}
    assert np.mean([bounds[v] <= truth for v in right.tolist()]) >= 0.95


def separated(runs):
    return np.full(runs, 1.0), np.zeros(runs)


def test_neighbour_bound_by_hand():
    # of 100 runs 90 are judged; without an error a rate is at most u, (1 - u)^90 = 0.025
    u = 1 - 0.025 ** (1 / 90)
    assert neighbour_epsilon(*separated(100), 1e-5) == pytest.approx(math.log((1 - u - 1e-5) / u))
    assert neighbour_epsilon(*separated(100), 1e-5) == pytest.approx(3.1739, abs=1e-4)
    assert neighbour_mu(*separated(100)) == pytest.approx(-2 * stats.norm.ppf(u))
    rate = 1 - 0.005 ** (1 / 90)
    assert neighbour_mu(*separated(100), confidence=0.99) == pytest.approx(-2 * stats.norm.ppf(rate))


def test_neighbour_bound_counts_errors_as_clopper_and_pearson_do():
    with_patient, without = separated(100)
    with_patient[[30, 60, 90]], without[[50]] = 0.0, 1.0
    missed, alarms = stats.beta.ppf(0.975, [3 + 1, 1 + 1], [90 - 3, 90 - 1])
    expected = max(math.log((1 - missed) / alarms), math.log((1 - alarms) / missed))
    assert neighbour_epsilon(with_patient, without, 0.0) == pytest.approx(expected)
    assert neighbour_mu(with_patient, without) == pytest.approx(-stats.norm.ppf([missed, alarms]).sum())


def test_neighbour_bound_of_scores_that_tell_nothing_is_zero():
    same = np.zeros(100)
    drawn = np.random.default_rng(0).normal(size=(2, 200))
    for scores in ((same, same), tuple(drawn), separated(100)[::-1]):
        assert neighbour_epsilon(*scores, 1e-5) == neighbour_mu(*scores) == 0


def test_threshold_is_chosen_on_other_runs_than_it_is_judged_by():
    with_patient, without = separated(100)
    with_patient[10:], without[10:] = 0.0, 1.0
    assert neighbour_epsilon(with_patient, without, 0.0) == neighbour_mu(with_patient, without) == 0


@pytest.mark.parametrize(("left", "right"), [(1, 5), (5, 1), (0, 0)])
def test_too_few_runs_are_refused(left, right):
    with pytest.raises(ValueError, match=f"at least 2 runs on each side, got {left} and {right}"):
        neighbour_epsilon(np.zeros(left), np.ones(right), 0.0)


def test_coverage_of_neighbours_under_randomised_response():
    truth, runs, rng = 1.0, 600, np.random.default_rng(0)
    right, bounds = 1 / (1 + math.exp(-truth)), []
    for _ in range(400):
        with_patient, without = rng.random(runs) < right, rng.random(runs) >= right
        bounds.append(neighbour_epsilon(with_patient.astype(float), without.astype(float), 0.0))
    assert np.mean(np.array(bounds) <= truth) >= 0.95
    assert np.mean(bounds) > truth / 2


def test_coverage_of_neighbours_under_a_normal_shift():
    mu, runs, rng = 1.0, 600, np.random.default_rng(0)
    drawn = rng.normal(size=(400, 2, runs))
    bounds = np.array([neighbour_mu(without + mu, noise) for without, noise in drawn])
    assert np.mean(bounds <= mu) >= 0.95
    assert bounds.mean() > 0.6 * mu
    by_mu = np.array([epsilon_of_mu(bound, 1e-5) for bound in bounds[:50]])
    plain = np.array([neighbour_epsilon(without + mu, noise, 1e-5) for without, noise in drawn[:50]])
    assert by_mu.mean() > 1.5 * plain.mean()  # what the assumption buys
    assert by_mu.max() <= epsilon_of_mu(mu, 1e-5)


def test_least_epsilon_and_mu_of_known_errors():
    rates = np.array([0.1]), np.array([0.3])
    assert epsilon_of_errors(*rates, 0.0)[0] == pytest.approx(math.log(7))
    assert epsilon_of_errors(*rates[::-1], 0.0)[0] == pytest.approx(math.log(7))
    assert epsilon_of_errors(*rates, 0.2)[0] == pytest.approx(math.log(5))
    assert epsilon_of_errors(np.array([0.5]), np.array([0.5]), 0.0)[0] == 0
    assert mu_of_errors(np.array([stats.norm.sf(1.3)]), np.array([stats.norm.cdf(1.3 - 2)]))[0] == pytest.approx(2)


@pytest.mark.parametrize(("mu", "delta"), [(0.1, 1e-5), (1.0, 1e-5), (1.0, 1e-2), (4.0, 1e-6), (9.0, 1e-5)])
def test_epsilon_of_mu_is_that_of_the_gaussian_mechanism(mu, delta):
    assert epsilon_of_mu(mu, delta) == pytest.approx(epsilon([Charge(1 / mu, 1.0, 1)], delta), rel=2e-3)
    assert epsilon_of_mu(0.0, delta) == epsilon_of_mu(1e-9, delta) == 0
