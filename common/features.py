"""The public feature map of the warm-up: pixels, edges and their moments, never longer than 1.

Every party builds the same map from size and channels of an image and a seed; nothing in it comes from data. Colour is
seen by the pixel cosines, edges in the mean of the channels. Out of scope: summing over patients (client/warmup) and
fitting to the sums (server/warmup).
"""

import functools
import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CONSTANT = 0.2
"""The first coordinate of every feature vector, so that a sum of vectors carries its own (noisy) count."""

LOW_COSINES = 64
"""Lowest cosine coefficients that are looked at one by one and in pairs."""

_PIXEL_BANDWIDTHS = (0.14, 0.25, 0.43)
"""Root-mean-square difference per pixel at which two images cease to look alike, coarse to fine."""
_EDGE_BANDWIDTHS = (0.17, 0.33)
"""The same for two unit vectors of edge strengths."""
_COSINES = 300
"""Random frequencies per bandwidth; each gives a cosine and a sine."""
_ORIENTATIONS = 8
_OCTAVES = 2
"""The same filters look at the image, at half its size, and so on."""
_WAVELENGTH_PX = 3.2
_KERNEL_PX = 7
_SHARES = (1.0, 1.0, 1.0, 0.25, 0.5)
"""Parts of the squared length: pixels, edges, cosines of edges, low coefficients, their products."""
_PIXEL_SIDE = 32
"""Larger images are averaged down to this side before the pixel cosines."""
_MARGIN = 1e-4
"""Keeps the norm under 1 when floats round up."""


@final
@dataclass(frozen=True)
class FeatureMap:
    """Fixed random frequencies and edge filters, built by `feature_map` from public values only.

    Attributes:
        size: Pixels along each side of an image.
        pixel_frequencies: One column per cosine over the flattened image, all channels.
        edge_filters: Gabor pairs (even, odd), alternating.
        edge_frequencies: One column per cosine over the pooled edge strengths.
    """

    size: int
    pixel_frequencies: Float[Tensor, "pixels cosines"]
    edge_filters: Float[Tensor, "filters 1 height width"]
    edge_frequencies: Float[Tensor, "strengths cosines"]


def feature_map(size: int, channels: int = 1, seed: int = 0) -> FeatureMap:
    """Build the map for images of `channels` x `size` x `size` pixels; its length does not depend on the channels.

    Args:
        size: Pixels along each side, at least 16.
        channels: 1 for grey images, 3 for colour.
        seed: A public seed; everybody in a run uses the same.

    Guarantees:
        - public: Equal arguments give equal maps, and nothing but the arguments enters, no global seed either.
    """
    rng = torch.Generator().manual_seed(seed)
    pixels = channels * min(size, _PIXEL_SIDE) ** 2
    filters = _gabor_filters()
    strengths = _octaves(size) * _ORIENTATIONS * _cells(size) ** 2
    return FeatureMap(
        size=size,
        pixel_frequencies=_frequencies(pixels, [b * math.sqrt(pixels) for b in _PIXEL_BANDWIDTHS], rng),
        edge_filters=filters,
        edge_frequencies=_frequencies(strengths, list(_EDGE_BANDWIDTHS), rng),
    )


def feature_dim(fm: FeatureMap) -> int:
    """Return the length of one feature vector."""
    cosines = 2 * (fm.pixel_frequencies.shape[1] + fm.edge_frequencies.shape[1])
    return 1 + cosines + fm.edge_frequencies.shape[0] + pairs(LOW_COSINES)


def pairs(width: int) -> int:
    """Return how many numbers a block and the products of its pairs are."""
    return width + width * (width + 1) // 2


def features(fm: FeatureMap, images: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch dim"]:
    """Map images to feature vectors.

    Args:
        fm: The map.
        images: Pixels in [-1, 1], as many channels as the map is for.

    Returns:
        One vector per image; the first coordinate is the constant `CONSTANT`.

    Guarantees:
        - unit_norm: Every vector has an L2 norm of at most 1, whatever the pixels are.
        - differentiable: Gradients with respect to the pixels are finite everywhere, constant images included.

    Source:
        Rahimi and Recht 2007 (random features); Harder et al. 2021, DP-MERF, section 3 (mean embeddings).
    """
    small = shrink(images, _PIXEL_SIDE)
    strengths = _edge_strengths(fm, images)
    low = _low(small)
    blocks = [
        _cosines(small.flatten(1), fm.pixel_frequencies),
        strengths,
        _cosines(strengths, fm.edge_frequencies),
        low,
        products(low),
    ]
    constant = torch.full((len(images), 1), CONSTANT, dtype=images.dtype)
    parts = [(1 - CONSTANT**2 - _MARGIN) * share / sum(_SHARES) for share in _SHARES]
    weighted = [block * math.sqrt(part) for block, part in zip(blocks, parts, strict=True)]
    return torch.cat([constant, *weighted], dim=1)


def shrink(
    images: Float[Tensor, "batch channels size size"], side: int
) -> Float[Tensor, "batch channels smaller smaller"]:
    """Average images down to `side` where they are larger."""
    return images if images.shape[-1] <= side else F.adaptive_avg_pool2d(images, side)


def low_frequencies(side: int) -> list[tuple[int, int]]:
    """Return the lowest cosine frequencies (down, across) of images of a side, low ones first."""
    places = [(down, across) for down in range(side) for across in range(side)]
    return sorted(places, key=lambda place: (place[0] ** 2 + place[1] ** 2, place))[:LOW_COSINES]


@functools.cache
def low_basis(side: int) -> Float[Tensor, "pixels cosines"]:
    """Return the orthonormal cosines of the lowest frequencies over flattened images of a side."""
    place = (torch.arange(side) + 0.5) * math.pi / side
    waves = torch.stack([(place * k).cos() * math.sqrt((2 if k else 1) / side) for k in range(side)])
    return torch.stack([torch.outer(waves[d], waves[a]).flatten() for d, a in low_frequencies(side)], dim=1)


def products(vectors: Float[Tensor, "batch width"]) -> Float[Tensor, "batch pairs"]:
    """Return the products of all pairs of coordinates; a vector's length becomes its square."""
    width = vectors.shape[1]
    first, second = torch.triu_indices(width, width)
    weights = torch.where(first == second, 1.0, math.sqrt(2.0))
    all_pairs = (vectors[:, :, None] * vectors[:, None, :]).flatten(1)  # a third of the time of gathering both factors
    return all_pairs.index_select(1, first * width + second) * weights


def _low(small: Float[Tensor, "batch channels side side"]) -> Float[Tensor, "batch cosines"]:
    side = small.shape[-1]
    low = small.mean(dim=1).flatten(1) @ low_basis(side) * _rise(side)
    return low / (low.square().sum(dim=1, keepdim=True) + _MARGIN).sqrt()


@functools.cache
def _rise(side: int) -> Float[Tensor, " cosines"]:
    """Amplitudes of images fall with frequency; without this all of the length would go to the lowest few."""
    return torch.tensor([1 + math.hypot(*place) for place in low_frequencies(side)])


def _cosines(
    vectors: Float[Tensor, "batch inputs"], frequencies: Float[Tensor, "inputs cosines"]
) -> Float[Tensor, "batch 2*cosines"]:
    angles = vectors @ frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(frequencies.shape[1])


def _edge_strengths(
    fm: FeatureMap, images: Float[Tensor, "batch channels size size"]
) -> Float[Tensor, "batch strengths"]:
    if images.shape[1] > 1:
        images = images.mean(dim=1, keepdim=True)
    pooled: list[Tensor] = []
    for _ in range(_octaves(fm.size)):
        images = images.contiguous(memory_format=torch.channels_last)
        responses = F.conv2d(images, fm.edge_filters, padding=_KERNEL_PX // 2, stride=2)
        energy = responses[:, :_ORIENTATIONS].square() + responses[:, _ORIENTATIONS:].square()
        pooled.append(F.adaptive_avg_pool2d((energy + 1e-4).sqrt(), _cells(fm.size)).flatten(1))
        images = F.avg_pool2d(images, 2)
    strengths = torch.cat(pooled, dim=1)
    return strengths / strengths.norm(dim=1, keepdim=True)


def _octaves(size: int) -> int:
    return _OCTAVES if size <= _PIXEL_SIDE else _OCTAVES + 1


def _cells(size: int) -> int:
    return min(size, _PIXEL_SIDE) // 4


def _frequencies(inputs: int, bandwidths: list[float], rng: torch.Generator) -> Float[Tensor, "inputs cosines"]:
    return torch.cat([torch.randn(inputs, _COSINES, generator=rng) / b for b in bandwidths], dim=1)


def _gabor_filters() -> Float[Tensor, "filters 1 height width"]:
    axis = torch.arange(_KERNEL_PX, dtype=torch.float32) - _KERNEL_PX // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    window = torch.exp(-(x**2 + y**2) / (2 * (0.38 * _WAVELENGTH_PX) ** 2))
    angles = [math.pi * turn / _ORIENTATIONS for turn in range(_ORIENTATIONS)]
    phases = [2 * math.pi / _WAVELENGTH_PX * (x * math.cos(angle) + y * math.sin(angle)) for angle in angles]
    stack = torch.stack([window * phase.cos() for phase in phases] + [window * phase.sin() for phase in phases])
    stack = stack - stack.mean(dim=(1, 2), keepdim=True)
    return (stack / stack.flatten(1).norm(dim=1)[:, None, None])[:, None]
