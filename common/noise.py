"""Secret randomness: the Poisson draw of patients and the Gaussian noise, from an AES-256-CTR key stream.

Two sources of randomness never mix. *Reproducible*: weights, fake labels, shuffles and tests, from numpy's and torch's
generators. *Secret*: everything here. The secret stream is keyed by the operating system (`KeyStream.from_os`); only
the simulator, which has no secrets, passes a stream of its own by argument. No message can set a seed.

Out of scope: how much noise (common/privacy), where it is added (client/dp).
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from common.crypto import KeyStream

_WORD_BYTES = 8
_MANTISSA = (1 << 52) - 1
_ONE = 0x3FF0_0000_0000_0000  # bits of 1.0: with 52 random bits below it, a number of [1, 2)
_BELOW_ONE = 1.0 - 2.0**-53
_CHUNK = 1 << 13  # delivered samples worked on at a time, so that they stay in the cache


def uniform(stream: KeyStream, size: int) -> Float64[np.ndarray, " size"]:
    """Draw `size` numbers from the open interval (0, 1).

    Guarantees:
        - open_interval: Neither 0 nor 1 is ever drawn.
        - law: The odd multiples of 2^-53, each with the same probability.
    """
    return _uniform(stream, size).numpy()


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
    """Draw normal noise of mean zero in float64, to be added in float64 and rounded once, after the sum.

    Noise that is rounded to float32 before it is added betrays what it was added to: not every float32 sum can be
    reached from every exact value. So callers add first and round last.

    Each number is the sum of four normal numbers over two, so that the low bits of a float do not betray the noise that
    was added: an attacker would have to undo a sum of four (`2^159` tries).

    Args:
        stream: Secret bytes.
        shape: Of the result.
        std: Standard deviation; 0 gives zeros.

    Raises:
        ValueError: `std` is negative or not finite.

    Guarantees:
        - law: Normal with mean 0 and standard deviation `std`, cut at 17 standard deviations.
        - independent: Every number has bytes of its own.
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


def _sums_of_four(stream: KeyStream, size: int) -> Float[Tensor, " size"]:
    """Sum four independent normal numbers for each of `size`: variance 4.

    The two halves of one Box-Muller pair go to different sums: within one sum they would collapse to a single number.
    """
    half = (size + 1) // 2
    draws = _uniform(stream, 8 * half).view(2, 4, half)
    radius = draws[0].log_().mul_(-2.0).sqrt_()
    angle = draws[1].mul_(2.0 * math.pi)
    sums = torch.cat([torch.cos(angle).mul_(radius).sum(dim=0), angle.sin_().mul_(radius).sum(dim=0)])
    return sums[:size]


def _uniform(stream: KeyStream, size: int) -> Float[Tensor, " size"]:
    words = torch.empty(size, dtype=torch.int64)
    stream.fill(words.numpy())
    # [1, 2) less (1 - 2^-53) is exact, and symmetric about one half
    return words.bitwise_and_(_MANTISSA).bitwise_or_(_ONE).view(torch.float64).sub_(_BELOW_ONE)
