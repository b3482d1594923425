"""Law of the patient draw as training uses it: rate, independence between patients and between steps.

A fixed key; tolerances are five standard errors: the right law is accepted and a wrong one rejected in every run.
"""

import math

import numpy as np
import pytest

from client.intake import Dataset
from client.train import draw_patients
from common.crypto import KeyStream

PATIENTS, STEPS, RATE = 60, 3000, 0.13


@pytest.fixture(scope="module")
def drawn():
    """Return steps x patients: who was drawn when, read from the pixels of the batch; patients have 1 to 3 images."""
    patients = np.repeat(np.arange(PATIENTS), np.arange(PATIENTS) % 3 + 1)
    images = patients.astype(np.uint8).reshape(-1, 1, 1, 1)
    dataset, stream = Dataset(images, np.zeros_like(patients), patients), KeyStream(bytes(32)).derive("sampler")
    indicators = np.zeros((STEPS, PATIENTS))
    for step in range(STEPS):
        batch = draw_patients(dataset, RATE, 1, stream)
        rows = ((batch.images + 1) * 127.5).round().long().flatten().numpy()
        assert len(rows) == len(set(rows.tolist())) == batch.number_of_patients
        indicators[step, rows] = 1
    return indicators


def test_poisson_inclusion_rate_of_every_patient(drawn):
    rates, error = drawn.mean(axis=0), math.sqrt(RATE * (1 - RATE) / STEPS)
    assert np.all(np.abs(rates - RATE) < 5 * error)
    assert np.all(np.abs(rates - 1.5 * RATE) > 5 * error)
    assert abs(drawn.mean() - RATE) < 5 * error / math.sqrt(PATIENTS)
    assert abs(drawn.mean() - 1.05 * RATE) > 5 * error / math.sqrt(PATIENTS)


def test_poisson_patients_are_independent(drawn):
    def largest(indicators):
        return np.abs(np.corrcoef(indicators.T)[np.triu_indices(PATIENTS, 1)]).max()

    bound = 5 / math.sqrt(STEPS)
    assert largest(drawn) < bound
    tied = drawn.copy()
    tied[:, 1] = np.where(np.arange(STEPS) % 5 == 0, tied[:, 0], tied[:, 1])
    assert largest(tied) > bound


def test_poisson_batch_size_varies_as_a_binomial(drawn):
    """Batches of a fixed size, or shuffled epochs, have the right rate and no variance."""
    variance = PATIENTS * RATE * (1 - RATE)
    sizes, error = drawn.sum(axis=1), variance * math.sqrt(2 / STEPS)
    assert abs(sizes.var() - variance) < 5 * error
    assert variance > 5 * error
    assert abs((sizes == 0).mean() - (1 - RATE) ** PATIENTS) < 5 * math.sqrt((1 - RATE) ** PATIENTS / STEPS)


def test_poisson_steps_are_independent(drawn):
    def correlation(indicators, lag):
        centred = indicators - indicators.mean(axis=0)
        return (centred[lag:] * centred[:-lag]).sum() / (centred**2).sum()

    bound = 5 / math.sqrt(STEPS * PATIENTS)
    for lag in (1, 2, 7):
        assert abs(correlation(drawn, lag)) < bound
    repeated = np.where(np.arange(STEPS)[:, None] % 20 == 0, np.roll(drawn, 1, axis=0), drawn)
    assert abs(correlation(repeated, 1)) > bound
