"""Laws of the secret randomness. Each law is a function that the right draw passes and a broken one does not.

Fixed keys; tolerances are five standard errors: the right law is accepted and a wrong one rejected in every run.
"""

import math

import numpy as np
import pytest
from scipy import stats

from common.crypto import KeyStream
from common.noise import bernoulli, gaussian, to_public_grid, uniform

SIZE = 200_000
STD = 1.7


def stream(label):
    return KeyStream(bytes(32)).derive(label)


def noise(label, size=SIZE, std=STD):
    return gaussian(stream(label), (size,), std).numpy()


@pytest.fixture(scope="module")
def normal():
    return noise("normal")


def fits(draws, law):
    return stats.kstest(draws, law.cdf, method="asymp").pvalue > 0.01


def has_normal_moments(draws, std):
    z = draws / std
    # standard errors of the mean of z^k: sqrt((E z^2k - (E z^k)^2) / n)
    moments = ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170))
    return all(abs(np.mean(z**k) - mean) < 5 * math.sqrt(variance / len(z)) for k, mean, variance in moments)


def has_normal_tails(draws, std):
    """Count what lies beyond 2, 3 and 4 standard deviations, on each side."""
    for bound in (2.0, 3.0, 4.0):
        for side in (-draws, draws):
            probability = stats.norm.sf(bound)
            error = math.sqrt(len(draws) * probability)
            if abs((side > bound * std).sum() - len(draws) * probability) > 5 * error:
                return False
    return True


def correlation(left, right):
    return float(np.corrcoef(left, right)[0, 1])


def are_independent(left, right):
    """Neither they nor their squares, which share a radius where a pair was split wrongly, go together."""
    bound = 5 / math.sqrt(len(left))
    return abs(correlation(left, right)) < bound and abs(correlation(left**2, right**2)) < bound


def includes_at_rate(coins, probability):
    return abs(coins.mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / len(coins))


def sizes_are_binomial(sizes, patients, probability):
    expected = len(sizes) * stats.binom.pmf(range(patients + 1), patients, probability)
    observed = np.bincount(sizes, minlength=patients + 1)
    few = int(np.argmax(expected[3:] < 5)) + 3
    table = [np.append(x[:few], x[few:].sum()) for x in (observed, expected)]
    return stats.chisquare(*table).pvalue > 0.01


@pytest.mark.parametrize("on_grid", [False, True])
def test_law_of_the_noise_accepts_sigma_and_rejects_two_thirds_and_three_halves(on_grid):
    def fits_when_drawn_with(std):
        draws = gaussian(stream("normal"), (SIZE,), std)
        return fits((to_public_grid(draws, std) if on_grid else draws).numpy(), stats.norm(scale=STD))

    assert fits_when_drawn_with(STD)
    for wrong in (2 / 3, 3 / 2, 0.98, 1.02):
        assert not fits_when_drawn_with(wrong * STD)


def test_law_of_the_noise_moments(normal):
    assert has_normal_moments(normal, STD)
    assert not has_normal_moments(1.02 * normal, STD)
    assert not has_normal_moments(normal + 0.02 * STD, STD)
    uniforms = uniform(stream("twelve"), 12 * SIZE).reshape(12, SIZE)
    assert not has_normal_moments(STD * (uniforms.sum(axis=0) - 6), STD)  # right mean and variance, no tails


def test_law_of_the_noise_tails():
    draws = noise("tails", 2_000_000)
    assert has_normal_tails(draws, STD)
    assert not has_normal_tails(np.clip(draws, -4 * STD, 4 * STD), STD)
    assert not has_normal_tails(np.abs(draws), STD)
    coarse = np.maximum(uniform(stream("coarse"), 2_000_000), 2.0**-8)  # eight bits end at 3.3 standard deviations
    turn = np.cos(2 * np.pi * uniform(stream("turn"), 2_000_000))
    assert not has_normal_tails(STD * np.sqrt(-2 * np.log(coarse)) * turn, STD)


def test_law_of_the_uniform():
    draws = uniform(stream("uniform"), SIZE)
    assert fits(draws, stats.uniform)
    assert not fits(draws**1.02, stats.uniform)


@pytest.mark.parametrize("probability", [0.001, 0.32, 0.9])
def test_bernoulli_inclusion_rate(probability):
    label = f"rate {probability}"
    assert includes_at_rate(bernoulli(stream(label), SIZE, probability), probability)
    assert not includes_at_rate(bernoulli(stream(label), SIZE, min(1.0, 1.5 * probability)), probability)


def test_bernoulli_batch_sizes_are_binomial_and_may_be_empty():
    source, other = stream("batches"), stream("biased")
    sizes = np.array([bernoulli(source, 20, 0.1).sum() for _ in range(5000)])
    assert sizes_are_binomial(sizes, 20, 0.1)
    assert (sizes == 0).sum() > 0
    assert not sizes_are_binomial(np.full(5000, 2), 20, 0.1)  # batches of a fixed size
    assert not sizes_are_binomial(np.array([bernoulli(other, 20, 0.11).sum() for _ in range(5000)]), 20, 0.1)
    assert not sizes_are_binomial(10 * bernoulli(other, 5000, 0.2).astype(int), 20, 0.1)  # patients in one draw


def test_consecutive_draws_are_independent():
    source = stream("pairs")
    first, second = (gaussian(source, (SIZE,), 1.0).numpy() for _ in range(2))
    assert are_independent(first, second)
    restarted, again = (gaussian(stream("pairs"), (SIZE,), 1.0).numpy() for _ in range(2))
    assert np.array_equal(restarted, first)
    assert not are_independent(restarted, again)
    assert not are_independent(first, second + 0.03 * first)


def test_parameters_of_one_step_are_independent():
    left, right = (part.numpy() for part in gaussian(stream("parameters"), (2 * SIZE,), 1.0).split(SIZE))
    assert are_independent(left, right)
    halved = gaussian(stream("parameters"), (SIZE,), 1.0).numpy()
    assert not are_independent(left, halved)  # a second tensor that started the stream again


def test_numbers_of_one_draw_are_independent(normal):
    # the two halves of a Box-Muller pair stand half a chunk apart and share four radii
    halves = normal[: 12 * (1 << 14)].reshape(12, 2, -1)
    cosines, sines = halves[:, 0].ravel(), halves[:, 1].ravel()
    for left, right in ((normal[1:], normal[:-1]), (normal[8:], normal[:-8]), (cosines, sines)):
        assert are_independent(left, right)
    twice, in_turn = np.repeat(normal[: SIZE // 2], 2), np.tile(normal[:8], SIZE // 8)
    assert not are_independent(twice[1:], twice[:-1])
    assert not are_independent(in_turn[8:], in_turn[:-8])
    signs = np.sign(sines)
    assert abs(correlation(cosines, signs * cosines)) < 5 / math.sqrt(len(signs))
    assert not are_independent(cosines, signs * cosines)  # uncorrelated, but of one length


def test_coins_of_neighbours_and_of_steps_are_independent():
    source = stream("coins")
    first, second = (bernoulli(source, SIZE, 0.3).astype(float) for _ in range(2))
    assert are_independent(first, second)
    assert are_independent(first[1:], first[:-1])
    tied = np.where(np.arange(SIZE) % 20 == 0, first, second)
    assert not are_independent(first, tied)


def test_coins_and_noise_of_one_stream_are_independent():
    source = stream("both")
    coins, normal = bernoulli(source, SIZE, 0.3).astype(float), gaussian(source, (SIZE,), 1.0).numpy()
    assert are_independent(coins, normal)
    assert not are_independent(coins, normal + 0.05 * coins)


def test_streams_of_two_sites_are_independent():
    first, second = (noise(f"site {number}") for number in range(2))
    assert are_independent(first, second)
    one_key = [gaussian(KeyStream(bytes(32)), (SIZE,), 1.0).numpy() for _ in range(2)]
    assert not are_independent(*one_key)
