import math

import numpy as np
import pytest
import torch

from common.crypto import KeyStream
from common.noise import bernoulli, gaussian, uniform

KEY = bytes(range(32))


def test_uniform_open_interval_at_the_extreme_words():
    class Extreme:
        def __init__(self, byte):
            self.byte = byte

        def fill(self, buffer):
            buffer.view(np.uint8)[:] = self.byte

    assert uniform(Extreme(0), 1)[0] == 2.0**-53
    assert uniform(Extreme(255), 1)[0] == 1.0 - 2.0**-53


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
    assert len(draws.unique()) > 1990  # a float32 meets another now and then


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_gaussian_refuses_what_is_no_deviation(std):
    with pytest.raises(ValueError, match="std"):
        gaussian(KeyStream(KEY), (3,), std)


def test_each_number_is_a_sum_of_four_independent_normals_over_two():
    size = 1000  # one chunk: the bytes are read as 2 x 4 x 500 uniforms, radii first
    words = np.frombuffer(KeyStream(KEY).read(8 * 8 * (size // 2)), dtype="<u8") & np.uint64(2**52 - 1)
    draws = (words.astype(np.float64) + 0.5).reshape(2, 4, size // 2) * 2.0**-52
    radius, angle = np.sqrt(-2 * np.log(draws[0])), 2 * np.pi * draws[1]
    expected = np.concatenate([(radius * np.cos(angle)).sum(axis=0), (radius * np.sin(angle)).sum(axis=0)]) / 2
    assert np.allclose(gaussian(KeyStream(KEY), (size,), 3.0).numpy(), 3 * expected, rtol=1e-5, atol=1e-6)
