"""Law of the patient draw as training uses it: rate, independence between patients and between steps.

Each law is a function that the right draw passes and a broken one does not. A fixed key; tolerances are five standard
errors: the right law is accepted and a wrong one rejected in every run.
"""

import math

import numpy as np
import pytest

from client.draw import draw_patients
from client.intake import Dataset
from common.config import PrivacyConfig
from common.crypto import KeyStream

PATIENTS, STEPS, RATE = 60, 3000, 0.13
ONE_IMAGE = PrivacyConfig()


def draw(rate, steps=STEPS, privacy=ONE_IMAGE, site="sampler"):
    """Return steps x patients: who was drawn when, read from the pixels of the batch; patients have 1 to 3 images."""
    patients = np.repeat(np.arange(PATIENTS), np.arange(PATIENTS) % 3 + 1)
    images = patients.astype(np.uint8).reshape(-1, 1, 1, 1)
    dataset, stream = Dataset(images, np.zeros_like(patients), patients), KeyStream(bytes(32)).derive(site)
    indicators = np.zeros((steps, PATIENTS))
    for step in range(steps):
        batch = draw_patients(dataset, rate, privacy, stream)
        rows = ((batch.images + 1) * 127.5).round().long().flatten().numpy()
        assert len(rows) <= batch.number_of_patients * privacy.images_per_patient * privacy.views
        assert len(set(rows.tolist())) == batch.number_of_patients
        indicators[step, rows] = 1
    return indicators


@pytest.fixture(scope="module")
def drawn():
    return draw(RATE)


def fixed_size_batches():
    """Draw eight patients every time: the rate is nearly right, the law is not."""
    rng, indicators = np.random.default_rng(0), np.zeros((STEPS, PATIENTS))
    for step in range(STEPS):
        indicators[step, rng.permutation(PATIENTS)[:8]] = 1
    return indicators


def includes_everyone_at_rate(indicators):
    rates, error = indicators.mean(axis=0), math.sqrt(RATE * (1 - RATE) / len(indicators))
    return np.abs(rates - RATE).max() < 5 * error and abs(rates.mean() - RATE) < 5 * error / math.sqrt(PATIENTS)


def patients_are_independent(indicators):
    largest = np.abs(np.corrcoef(indicators.T)[np.triu_indices(PATIENTS, 1)]).max()
    return largest < 5 / math.sqrt(len(indicators))


def sizes_vary_as_a_binomial(indicators):
    variance, nobody = PATIENTS * RATE * (1 - RATE), (1 - RATE) ** PATIENTS
    sizes, steps = indicators.sum(axis=1), len(indicators)
    spread = abs(sizes.var() - variance) < 5 * variance * math.sqrt(2 / steps)
    return spread and abs((sizes == 0).mean() - nobody) < 5 * math.sqrt(nobody / steps)


def steps_are_independent(indicators):
    centred, bound = indicators - indicators.mean(axis=0), 5 / math.sqrt(indicators.size)
    correlations = [(centred[lag:] * centred[:-lag]).sum() / (centred**2).sum() for lag in (1, 2, 7)]
    return max(map(abs, correlations)) < bound


def sites_are_independent(one, other):
    return abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / math.sqrt(one.size)


def test_poisson_inclusion_rate_of_every_patient(drawn):
    assert includes_everyone_at_rate(drawn)
    assert not includes_everyone_at_rate(draw(1.05 * RATE))
    favoured = drawn.copy()
    favoured[:, 7] = np.maximum(favoured[:, 7], drawn[:, 8])
    assert not includes_everyone_at_rate(favoured)


def test_poisson_patients_are_independent(drawn):
    assert patients_are_independent(drawn)
    tied = drawn.copy()
    tied[:, 1] = np.where(np.arange(STEPS) % 5 == 0, tied[:, 0], tied[:, 1])
    assert not patients_are_independent(tied)


def test_poisson_batch_size_varies_as_a_binomial(drawn):
    """Batches of a fixed size, or shuffled epochs, have the right rate and no variance."""
    assert sizes_vary_as_a_binomial(drawn)
    assert not sizes_vary_as_a_binomial(fixed_size_batches())
    assert not sizes_vary_as_a_binomial(np.repeat(drawn[:, ::2], 2, axis=1))  # patients drawn two at a time


def test_poisson_steps_are_independent(drawn):
    assert steps_are_independent(drawn)
    assert not steps_are_independent(np.where(np.arange(STEPS)[:, None] % 20 == 0, np.roll(drawn, 1, axis=0), drawn))
    assert not steps_are_independent(np.roll(np.repeat(drawn[: STEPS // 2], 2, axis=0), 1, axis=0))


def test_poisson_sites_are_independent(drawn):
    steps, one = 1000, drawn[:1000]
    other = draw(RATE, steps, site="another sampler")
    assert sites_are_independent(one, other)
    assert not sites_are_independent(one, draw(RATE, steps))
    assert not sites_are_independent(one, np.where(np.arange(steps)[:, None] % 20 == 0, one, other))


def test_poisson_law_is_the_same_when_images_and_views_are_drawn_too():
    """A patient's number of images decides how much of the stream goes to them, and must not decide who comes next."""
    drawn = draw(RATE, 1500, PrivacyConfig(images_per_patient=2, views=2))
    assert includes_everyone_at_rate(drawn)
    assert patients_are_independent(drawn)
    assert sizes_vary_as_a_binomial(drawn)
    assert steps_are_independent(drawn)


def test_poisson_small_rate_gives_mostly_empty_batches_and_rate_one_everybody():
    sizes = draw(0.001, steps=1000).sum(axis=1)
    nobody = 0.999**PATIENTS
    assert abs((sizes == 0).mean() - nobody) < 5 * math.sqrt(nobody * (1 - nobody) / 1000)
    assert draw(1.0, steps=20).all()
