"""The numbers of a secure sum, and the law of a sum of rounded normal numbers, computed exactly."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr

from common.errors import ConfigError, WireError
from common.secure_sum import (
    GRID,
    MIN_STEPS,
    WARMUP_GRID,
    Cohort,
    check_integers,
    noise_shares,
    parse_cohort,
    to_integers,
)

GOOD = {"cohort_sites": 3, "cohort_patients": 120}


def test_a_cohort_comes_back_as_it_was_told():
    assert parse_cohort(Cohort(3, 120).settings(), 40, 20) == Cohort(3, 120)
    assert parse_cohort({"cohort_sites": 1, "cohort_patients": 40}, 40, 20) == Cohort(1, 40)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cohort_sites": 3},
        {**GOOD, "noise_multiplier": 0.0},
        {"cohort_sites": 3, "cohort_patient": 120},
        *({**GOOD, "cohort_sites": value} for value in (0, -1, True, 3.0, "3", None, 10_001, 10**400, [3])),
        *({**GOOD, "cohort_patients": value} for value in (0, 79, True, 120.0, "120", None, 100_000_001, 10**400)),
        {"cohort_sites": 6, "cohort_patients": 120},
    ],
)
def test_a_cohort_that_cannot_be_is_refused(settings):
    with pytest.raises(WireError):
        parse_cohort(settings, 40, 20)


def test_noise_is_split_among_those_who_are_surely_honest():
    five = Cohort(5, 500)
    assert [noise_shares(five, t) for t in ("all", 4, 3, 0)] == [1, 1, 2, 5]
    for colluding in (5, 9):
        with pytest.raises(ConfigError, match="below the number of sites, 5"):
            noise_shares(five, colluding)


def test_check_integers_fits_and_fine_grid():
    for grid in (GRID, WARMUP_GRID):
        check_integers(256, 1.0, grid)
        check_integers(256, MIN_STEPS * grid, grid)
        with pytest.raises(ConfigError, match="rounding to the grid would show"):
            check_integers(256, 0.99 * MIN_STEPS * grid, grid)
        most = 2**31 * grid - 1 - 2128 - 1  # bounds that are left for the noise
        check_integers(2128, most / (1.01 * 17.2) * 0.999, grid)
        for patients, noise in ((2128, most / (1.01 * 17.2) * 1.001), (int(2**31 * grid), 1.0)):
            with pytest.raises(ConfigError, match="in one share"):
                check_integers(patients, noise, grid)


@given(st.lists(st.floats(-1e12, 1e12), min_size=1), st.sampled_from([GRID, WARMUP_GRID, 0.3]))
def test_to_integers_always_fits(values, step):
    noisy = torch.tensor(values, dtype=torch.float64)
    whole = to_integers(noisy, step)
    assert whole.dtype == np.int32
    cut = np.abs(noisy.numpy() / step) > 2**31 - 1
    assert (np.abs(whole[cut]) == 2**31 - 1).all()
    assert np.abs(whole[~cut] - noisy.numpy()[~cut] / step).max(initial=0) <= 0.5
    assert torch.equal(noisy, torch.tensor(values, dtype=torch.float64))


def cells(k, mean, std):
    """P(round(N(mean, std^2)) = k), to full precision in the tails."""
    z, half = np.abs(k - mean) / std, 0.5 / std
    return ndtr(half - z) - ndtr(-half - z)


def exact(offsets, std, reach):
    """The law of the sum of independently rounded normal numbers, on -n*reach..n*reach."""
    law, k = np.ones(1), np.arange(-reach, reach + 1)
    for offset in offsets:
        law = np.convolve(law, cells(k, offset, std))
    return law


def stated(offsets, std, reach, uniforms):
    """The law of round(sum of offsets + N(0, n std^2) + W), W a sum of uniform numbers of [-1/2, 1/2]."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    w, chance = np.zeros(1), np.ones(1)
    for _ in range(uniforms):
        w, chance = np.add.outer(w, nodes / 2).ravel(), np.outer(chance, weights / 2).ravel()
    k = np.arange(-len(offsets) * reach, len(offsets) * reach + 1)
    all_std = std * math.sqrt(len(offsets))
    return sum(p * cells(k, sum(offsets) + shift, all_std) for shift, p in zip(w, chance, strict=True))


def distance(offsets, std, uniforms):
    reach = 3 + math.ceil(12 * std)
    return 0.5 * np.abs(exact(offsets, std, reach) - stated(offsets, std, reach, uniforms)).sum()


@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_sum_of_rounded_normals_has_the_stated_law(sites, std):
    offsets = np.random.default_rng(0).uniform(-3, 3, (20, sites))
    furthest = max(distance(some, std, sites - 1) for some in offsets)
    assert furthest <= max(math.exp(-((math.pi * std) ** 2)), 1e-14)  # what is asked for is MIN_STEPS = 64
    if (sites, std) == (2, 0.5):
        assert furthest > 0.3 * math.exp(-((math.pi * std) ** 2))  # so the bound is not idle


@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize("wrong", ["no W", "one uniform too many"])
def test_another_law_is_told_apart(sites, wrong):
    """Without W, or with more of it, the distance is a thousand times what is allowed at the same deviation."""
    offsets = np.random.default_rng(0).uniform(-3, 3, (20, sites))
    uniforms = 0 if wrong == "no W" else sites
    assert min(distance(some, 2.0, uniforms) for some in offsets) > 1e-3


def test_at_the_least_deviation_nothing_is_left():
    assert -((math.pi * MIN_STEPS) ** 2) < -40_000  # natural logarithm of the distance
