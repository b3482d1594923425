import math

import numpy as np
import pytest
import torch

from common.crypto import KeyStream
from common.noise import bernoulli, gaussian, to_public_grid, uniform

KEY = bytes(range(32))


class Constant:
    """A stream of one byte, over and over."""

    def __init__(self, byte):
        self.byte = byte

    def fill(self, buffer):
        buffer.view(np.uint8)[:] = self.byte


def test_uniform_open_interval_at_the_extreme_words():
    assert uniform(Constant(0), 1)[0] == 2.0**-53
    assert uniform(Constant(255), 1)[0] == 1.0 - 2.0**-53


def test_uniform_law_has_53_bits():
    draws = uniform(KeyStream(KEY), 10_000)
    scaled = draws * 2.0**53
    assert draws.dtype == np.float64
    assert np.all(scaled == np.floor(scaled))
    assert np.all(scaled % 2 == 1)
    assert len(np.unique(draws)) == len(draws)


def test_bernoulli_exact_at_0_and_1():
    assert not bernoulli(KeyStream(KEY), 10_000, 0.0).any()
    assert bernoulli(KeyStream(KEY), 10_000, 1.0).all()


@pytest.mark.parametrize("probability", [2.0**-64, 0.25, 1 / 3, 1 - 2.0**-53])
def test_bernoulli_exact_threshold(probability):
    threshold = math.floor(probability * 2.0**64)

    class Words:
        def read(self, size_bytes):
            return np.array([0, threshold - 1, threshold, 2**64 - 1], dtype="<u8").tobytes()[:size_bytes]

    assert bernoulli(Words(), 4, probability).tolist() == [True, True, False, False]


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_bernoulli_refuses_what_is_no_probability(probability):
    with pytest.raises(ValueError, match="probability"):
        bernoulli(KeyStream(KEY), 3, probability)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (5, 7), (8193,), (2, 8192)])
def test_gaussian_shapes(shape):
    noise = gaussian(KeyStream(KEY), shape, 2.0)
    assert noise.shape == shape
    assert noise.dtype == torch.float64


def test_gaussian_is_reproducible_from_a_passed_stream_and_scales():
    one = gaussian(KeyStream(KEY), (1000,), 1.0)
    assert torch.equal(one, gaussian(KeyStream(KEY), (1000,), 1.0))
    assert torch.allclose(3 * one, gaussian(KeyStream(KEY), (1000,), 3.0))
    assert not gaussian(KeyStream(KEY), (1000,), 0.0).any()


def test_gaussian_never_reused_between_calls():
    stream = KeyStream(KEY)
    draws = torch.cat([gaussian(stream, (1000,), 1.0), gaussian(stream, (1000,), 1.0)])
    assert len(draws.unique()) == 2000
    repeated = torch.cat([gaussian(KeyStream(KEY), (1000,), 1.0) for _ in range(2)])
    assert len(repeated.unique()) == 1000


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_gaussian_refuses_what_is_no_deviation(std):
    with pytest.raises(ValueError, match="std"):
        gaussian(KeyStream(KEY), (3,), std)


def sums_of_four(words, size):
    """Compute the noise of one chunk by its definition; the radii are read first."""
    draws = ((words & np.uint64(2**52 - 1)).astype(np.float64) + 0.5).reshape(2, 4, size // 2) * 2.0**-52
    radius, angle = np.sqrt(-2 * np.log(draws[0])), 2 * np.pi * draws[1]
    return np.concatenate([(radius * np.cos(angle)).sum(axis=0), (radius * np.sin(angle)).sum(axis=0)]) / 2


def test_each_number_is_a_sum_of_four_independent_normals_over_two():
    size = 1000
    words = np.frombuffer(KeyStream(KEY).read(8 * 8 * (size // 2)), dtype="<u8")
    noise = gaussian(KeyStream(KEY), (size,), 3.0).numpy()
    assert np.allclose(noise, 3 * sums_of_four(words, size), rtol=0, atol=1e-13)
    assert not np.allclose(noise, 3 * sums_of_four(np.roll(words, 1), size), rtol=0, atol=1e-13)


def test_gaussian_independent_bytes_of_a_pair_move_no_other_number():
    """Sixty-four bytes belong to numbers 3 and 503 of a chunk of 1000, and to no other."""

    class Changed:
        def fill(self, buffer):
            KeyStream(KEY).fill(buffer)
            buffer.reshape(8, 500)[:, 3] ^= np.uint64(1 << 51)

    moved = gaussian(Changed(), (1000,), 1.0) != gaussian(KeyStream(KEY), (1000,), 1.0)
    assert moved.nonzero().flatten().tolist() == [3, 503]


def test_gaussian_tails_end_at_17_standard_deviations():
    farthest = gaussian(Constant(0), (1,), 1.0)  # the smallest uniforms: the longest radius, at angle nought
    assert 17.1 < float(farthest) < 17.2
    assert abs(float(gaussian(Constant(255), (1,), 1.0))) < 1e-7


@pytest.mark.parametrize(("std", "step"), [(1.0, 2.0**-16), (1.9, 2.0**-16), (0.4, 2.0**-18), (3e5, 4.0)])
def test_to_public_grid_on_grid_and_nearest(std, step):
    noisy = gaussian(KeyStream(KEY), (10_000,), std) + 0.1 * std
    rounded = to_public_grid(noisy, std)
    assert torch.equal(rounded % step, torch.zeros(10_000, dtype=torch.float64))
    assert float((rounded - noisy).abs().max()) <= step / 2
    assert float((noisy % step).max()) > 0


def test_to_public_grid_leaves_what_has_no_noise_and_what_is_not_finite():
    noisy = torch.tensor([0.1, math.inf, -math.inf, 1e300], dtype=torch.float64)
    assert torch.equal(to_public_grid(noisy, 0.0), noisy)
    assert torch.equal(to_public_grid(noisy, 1.0)[1:], noisy[1:])


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, 1e-300])
def test_to_public_grid_refuses_what_is_no_deviation(std):
    with pytest.raises(ValueError, match="std"):
        to_public_grid(torch.zeros(3, dtype=torch.float64), std)


def test_to_public_grid_hides_the_data_where_the_noise_cancels_it():
    """Haney et al. 2022: where the noise nearly cancels the data, float32 keeps bits that no noise has."""
    noise = gaussian(KeyStream(KEY).derive("cancels"), (1_000_000,), 1.0)
    noise = noise[noise.abs() < 2.0**-13]
    data = -noise + 3 * 2.0**-66  # exact: so small a number has bits down there

    def betrayed(released):
        return float(((released * 2.0**60) % 1 != 0).double().mean())

    with_data = (noise + data).float().double()
    assert len(noise) > 50
    assert betrayed(with_data) == 1
    assert betrayed(noise.float().double()) < 0.1
    assert torch.equal(to_public_grid(noise + data, 1.0), torch.zeros_like(noise))
    assert (to_public_grid(noise, 1.0) == 0).sum() > 3  # what the data's release shows happens without the data too
