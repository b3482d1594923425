"""Clipping and adding: norms of many numbers, rounding beside loud company, overflow."""

import math

import pytest
import torch

from client.dp.contributions import Formed, Unformed, add_clipped
from client.dp.step import rounding

PATIENTS, NUMBERS = 64, 3000


def summed(values, clip=1.0, last=None):
    total = torch.zeros(values.shape[1], dtype=torch.float64)
    add_clipped(total, [Formed(values, 0)], last, clip)
    return total


def drawn(seed, scale=1.0):
    return torch.randn(PATIENTS, NUMBERS, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("patients", [64, 2048])
def test_one_clipped_contribution_and_rounding_below_what_the_noise_allows_for(scale, aligned, patients):
    """A patient who joins moves all others to other places and other eights; rounding adds little, however many."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(patients, 500, generator=generator) * scale
    if aligned:
        values = values[:1] * (1 + 0.01 * torch.rand(patients, 1, generator=generator))

    def total(rows):
        result = torch.zeros(rows.shape[1], dtype=torch.float64)
        for chunk in rows.split(64):
            blank = torch.zeros(64 - len(chunk), rows.shape[1])
            add_clipped(result, [Formed(torch.cat([chunk, blank]), 0)], None, 1.0)
        return result

    newcomer = -values[:1]
    moved = (total(torch.cat([newcomer, values])) - total(values)).norm().item()
    expected = min(1.0, newcomer.double().norm().item())
    assert abs(moved - expected) < rounding(patients / 2)


@pytest.mark.parametrize("numbers", [1, 7, 2048, 4096, 3_000_000])
def test_norms_of_many_numbers_come_out_long_enough(numbers):
    values = torch.full((1, numbers), 8e-4)
    values[0, 0] = 1.0
    norm = Formed(values, 0).squared_norms().sqrt().item()
    true = math.sqrt(1 + (numbers - 1) * 6.4e-7)
    assert true * (1 - 2.0**-13) < norm < true * (1 + 2.0**-13)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e19, 3e38])
def test_a_patient_that_overflows_counts_as_zero_and_leaves_the_others_alone(value):
    values = drawn(1)
    values[5, 17] = value
    without = values.clone()
    without[5] = 0.0
    assert torch.equal(summed(values), summed(without))


@pytest.mark.parametrize("few", [1, 5, 1000])
def test_the_last_matrix_is_clipped_together_with_the_rest(few):
    generator = torch.Generator().manual_seed(2)
    outputs, inputs = torch.randn(6, 4, 3, generator=generator), torch.randn(6, 4, 5, generator=generator)
    rest = torch.randn(6, 2, generator=generator)
    whole = torch.cat([rest, (outputs.transpose(1, 2) @ inputs).flatten(1)], dim=1).double()
    expected = (whole / whole.norm(dim=1, keepdim=True).clamp(min=1.0)).sum(0)
    total = torch.zeros(17, dtype=torch.float64)
    add_clipped(total, [Formed(rest, 0)], Unformed(outputs, inputs, 2, torch.empty(15 * few)), 1.0)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
