"""Secret randomness: the Poisson draw of patients and the Gaussian noise, from an AES-256-CTR key stream.

Two sources of randomness never mix. *Reproducible*: weights, fake labels, shuffles and tests, from numpy's and torch's
generators. *Secret*: everything here. The secret stream is keyed by the operating system (`KeyStream.from_os`); only
the simulator, which has no secrets, passes a stream of its own by argument. No message can set a seed.

Out of scope: how much noise (common/privacy), where it is added (client/dp).
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from common.crypto import KeyStream

_WORD_BYTES = 8
_MANTISSA = np.uint64((1 << 52) - 1)
_ONE = np.uint64(0x3FF0_0000_0000_0000)  # bits of 1.0: with 52 random bits below it, a number of [1, 2)
_BELOW_ONE = 1.0 - 2.0**-53
_CHUNK = 1 << 14  # numbers delivered at a time: a megabyte of words, few calls
_GRID = 2.0**-16  # of the standard deviation's power of two


def uniform(stream: KeyStream, size: int) -> Float64[np.ndarray, " size"]:
    """Draw `size` numbers from the open interval (0, 1).

    Guarantees:
        - open_interval: Neither 0 nor 1 is ever drawn.
        - law: The odd multiples of 2^-53, each with the same probability.
    """
    words = np.empty(size, dtype=np.uint64)
    stream.fill(words)
    np.bitwise_and(words, _MANTISSA, out=words)
    np.bitwise_or(words, _ONE, out=words)
    draws = words.view(np.float64)
    return np.subtract(draws, _BELOW_ONE, out=draws)  # exact, and symmetric about one half


def bernoulli(stream: KeyStream, size: int, probability: float) -> Bool[np.ndarray, " size"]:
    """Include each of `size` patients independently with the same probability: one Poisson draw.

    Args:
        stream: Secret bytes.
        size: How many coins are tossed.
        probability: In [0, 1].

    Raises:
        ValueError: The probability is outside [0, 1].

    Guarantees:
        - exact: A 64-bit integer is compared with floor(probability * 2^64): at most `probability`, short by less
          than 2^-64; 0 and 1 are exact.
        - independent: Every coin has bytes of its own.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"Expected probability={probability} in [0, 1].")
    words = np.frombuffer(stream.read(size * _WORD_BYTES), dtype="<u8")
    if probability == 1.0:
        return np.ones(size, dtype=np.bool_)
    return words < np.uint64(math.floor(probability * 2.0**64))


def gaussian(stream: KeyStream, shape: tuple[int, ...], std: float) -> Float64[Tensor, "..."]:
    """Draw normal noise of mean zero in float64, to be added in float64, put on a grid and rounded once, after the sum.

    Noise that is rounded to float32 before it is added betrays what it was added to: not every float32 sum can be
    reached from every exact value. So callers add first, then call `to_public_grid`, and go to float32 last.

    Each number is the sum of four normal numbers over two, so that an attacker who looks for noise that no draw can
    give must undo a sum of four. The two halves of a Box-Muller pair go to different numbers: within one sum they would
    collapse to a single number, and the sum would have half the unknowns.

    Args:
        stream: Secret bytes.
        shape: Of the result.
        std: Standard deviation; 0 gives zeros.

    Raises:
        ValueError: `std` is negative or not finite.

    Guarantees:
        - law: Normal with mean 0 and standard deviation `std`.
        - tails: Cut at 17.2 standard deviations, each of the four at 8.6, beyond which there is 2^-53 of its law.
        - independent: Every pair of numbers has bytes of its own, sixty-four.
        - never_reused: Two calls on one stream share no bytes.

    Source: Holohan and Braghin 2021 (arXiv:2107.10138), section 5.1, with n = 2, as `_generate_noise` of
        opacus/optimizers/optimizer.py has it in secure mode; Box and Muller 1958.
    """
    if not (math.isfinite(std) and std >= 0.0):
        raise ValueError(f"Expected std={std} finite and at least 0.")
    noise = torch.empty(math.prod(shape), dtype=torch.float64)
    for part in noise.split(_CHUNK):
        part.copy_(_sums_of_four(stream, part.numel()).mul_(std / 2.0))
    return noise.reshape(shape)


def to_public_grid(noisy: Float64[Tensor, "..."], std: float) -> Float64[Tensor, "..."]:
    """Round a noisy sum to the nearest multiple of a grid that depends on nothing but the noise's deviation.

    A small result of a sum of floats keeps bits that its noise does not reach: noise of about one comes in steps near
    2^-53, and where it nearly cancels what it was added to, lower bits are those of the data. Here they are dropped.
    For the exact law this is post-processing and costs no budget. The rounding errors of the sampler, about 2^-50 of
    `std`, then show only in the rare value that lies within as much of the middle between two grid points.

    Args:
        noisy: Sum and noise of `gaussian`, in float64.
        std: The noise's standard deviation; 0 leaves the sum as it is.

    Raises:
        ValueError: `std` is negative, not finite or below 1e-290.

    Guarantees:
        - on_grid: The result is a multiple of 2^-16 times the power of two at or below `std`.
        - nearest: It moves by at most half of that; what is not finite stays.

    Source: Mironov 2012 (On Significance of the Least Significant Bits For Differential Privacy), the rounding step of
        its mechanism; Haney et al. 2022 (arXiv:2207.13793), the attack on what cancels.
    """
    if std == 0.0:
        return noisy
    if not (math.isfinite(std) and std >= 1e-290):
        raise ValueError(f"Expected std={std} finite and 0 or at least 1e-290.")
    step = _GRID * math.ldexp(0.5, math.frexp(std)[1])  # a power of two, so dividing and multiplying are exact
    return (noisy / step).round() * step


def _sums_of_four(stream: KeyStream, size: int) -> Float64[Tensor, " size"]:
    """Sum four independent normal numbers for each of `size`: variance 4."""
    half = (size + 1) // 2
    draws = uniform(stream, 8 * half).reshape(2, 4, half)
    # with AVX-512 numpy is the faster one at log and sqrt, torch at cos and sin
    radius = np.log(draws[0], out=draws[0])
    radius *= -2.0
    radius, angle = torch.from_numpy(np.sqrt(radius, out=radius)), torch.from_numpy(draws[1]).mul_(2.0 * math.pi)
    sums = torch.cat([torch.cos(angle).mul_(radius).sum(dim=0), angle.sin_().mul_(radius).sum(dim=0)])
    return sums[:size]
