"""Laws of the secret randomness.

Fixed keys; tolerances are five standard errors: the right law is accepted and a wrong one rejected in every run.
"""

import math

import numpy as np
import pytest
from scipy import stats

from common.crypto import KeyStream
from common.noise import bernoulli, gaussian, uniform

SIZE = 200_000


def stream(label):
    return KeyStream(bytes(32)).derive(label)


@pytest.fixture(scope="module")
def normal():
    return gaussian(stream("normal"), (SIZE,), 1.7).numpy().astype(np.float64)


def test_law_of_the_noise_accepts_sigma_and_rejects_two_thirds_and_three_halves(normal):
    def p_value(std):
        return stats.kstest(normal, stats.norm(scale=std).cdf).pvalue

    assert p_value(1.7) > 0.01
    assert p_value(1.7 * 2 / 3) < 1e-9
    assert p_value(1.7 * 3 / 2) < 1e-9
    assert p_value(1.7 * 1.02) < 0.01


def test_law_of_the_noise_moments(normal):
    z = normal / 1.7
    # standard errors of the mean of z^k: sqrt((E z^2k - (E z^k)^2) / n)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(z**power) - expected) < 5 * math.sqrt(variance / SIZE)
    assert abs(np.mean((1.05 * z) ** 4) - 3) > 5 * math.sqrt(96 / SIZE)


def test_law_of_the_uniform():
    draws = uniform(stream("uniform"), SIZE)
    assert stats.kstest(draws, stats.uniform.cdf).pvalue > 0.01
    assert stats.kstest(draws**1.02, stats.uniform.cdf).pvalue < 0.01


@pytest.mark.parametrize("probability", [0.001, 0.32, 0.9])
def test_bernoulli_inclusion_rate(probability):
    rate = bernoulli(stream(f"rate {probability}"), SIZE, probability).mean()
    error = math.sqrt(probability * (1 - probability) / SIZE)
    assert abs(rate - probability) < 5 * error
    assert abs(rate - 1.5 * probability) > 5 * error


def test_bernoulli_batch_sizes_are_binomial_and_may_be_empty():
    source = stream("batches")
    sizes = np.array([bernoulli(source, 20, 0.1).sum() for _ in range(5000)])
    expected = 5000 * stats.binom.pmf(range(21), 20, 0.1)
    observed = np.bincount(sizes, minlength=21)
    few = int(np.argmax(expected[3:] < 5)) + 3
    table = [np.append(x[:few], x[few:].sum()) for x in (observed, expected)]
    assert stats.chisquare(*table).pvalue > 0.01
    assert (sizes == 0).sum() > 0


def correlation(left, right):
    return float(np.corrcoef(left, right)[0, 1])


def test_consecutive_draws_are_independent(normal):
    source = stream("pairs")
    first, second = (gaussian(source, (SIZE,), 1.0).numpy() for _ in range(2))
    coins = bernoulli(source, SIZE, 0.3).astype(float)
    bound = 5 / math.sqrt(SIZE)
    pairs = [(first, second), (first**2, second**2), (first[1:], first[:-1]), (coins[1:], coins[:-1])]
    # the two halves of a Box-Muller pair stand half a chunk apart, and have one radius
    pairs += [(normal[4096:8192], normal[:4096]), (normal[4096:8192] ** 2, normal[:4096] ** 2)]
    for left, right in pairs:
        assert abs(correlation(left, right)) < max(bound, 5 / math.sqrt(len(left)))
    assert correlation(first, first + 50 * bound * second) > bound


def test_streams_of_two_sites_are_independent():
    first, second = (gaussian(stream(f"site {number}"), (SIZE,), 1.0).numpy() for number in range(2))
    assert abs(correlation(first, second)) < 5 / math.sqrt(SIZE)
