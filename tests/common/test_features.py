"""The public feature map: bounded, public, differentiable."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.features import (
    CONSTANT,
    LOW_COSINES,
    FeatureMap,
    feature_dim,
    feature_map,
    features,
    low_basis,
    low_frequencies,
    pairs,
    products,
    shrink,
)
from common.lens import low_pass

SIZES = (28, 32, 64)


def tensors(fm: FeatureMap) -> list[Tensor]:
    return [value for value in vars(fm).values() if isinstance(value, Tensor)]


def test_public() -> None:
    torch.manual_seed(1)
    first = feature_map(32, seed=5)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = feature_map(32, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {field.name for field in dataclasses.fields(FeatureMap)} >= {"size", "pixel_frequencies"}
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))
    other = feature_map(32, seed=6)
    assert not torch.equal(first.pixel_frequencies, other.pixel_frequencies)


@pytest.mark.parametrize("size", SIZES)
def test_unit_norm_on_adversarial_images(size: int) -> None:
    fm = feature_map(size)
    rng = torch.Generator().manual_seed(0)
    checks = torch.arange(size)[:, None] + torch.arange(size)[None]
    images = torch.stack(
        [
            torch.zeros(size, size),
            torch.ones(size, size),
            -torch.ones(size, size),
            (checks % 2) * 2.0 - 1,
            (torch.arange(size) % 2 * 2.0 - 1).expand(size, size),
            torch.randn(size, size, generator=rng) * 1e4,
            torch.rand(size, size, generator=rng) * 2 - 1,
            torch.full((size, size), 1e-20),
        ]
    )[:, None]
    vectors = features(fm, images)
    assert vectors.shape == (len(images), feature_dim(fm))
    assert torch.all(vectors.double().norm(dim=1) <= 1)
    assert torch.allclose(vectors[:, 0], torch.tensor(CONSTANT))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 2**31), scale=st.floats(0, 1))
def test_unit_norm(seed: int, scale: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    for channels in (1, 3):
        images = (torch.randn(4, channels, 28, 28, generator=rng) * scale).clamp(-1, 1)
        assert torch.all(features(feature_map(28, channels), images).double().norm(dim=1) <= 1)


def test_the_grey_map_is_what_it_was() -> None:
    """The first draws of the seed, scaled by the coarsest bandwidth: whoever has fitted to the grey map still can."""
    drawn = torch.randn(28 * 28, 300, generator=torch.Generator().manual_seed(0)) / (0.14 * 28)
    assert torch.equal(feature_map(28).pixel_frequencies[:, :300], drawn)


def test_colour_is_seen_by_the_pixel_cosines_and_edges_in_the_mean() -> None:
    grey, colour = feature_map(28), feature_map(28, 3)
    assert colour.pixel_frequencies.shape == (3 * 28 * 28, 900)
    assert feature_dim(grey) == feature_dim(colour)
    image = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen, turned = features(colour, image), features(colour, image.flip(1))
    alike = features(dataclasses.replace(colour, edge_frequencies=grey.edge_frequencies), image)
    strengths = slice(1 + 2 * 900, 1 + 2 * 900 + grey.edge_frequencies.shape[0])
    assert torch.allclose(seen[:, strengths], turned[:, strengths], atol=1e-6)
    assert torch.equal(alike[:, strengths], features(grey, image.mean(dim=1, keepdim=True))[:, strengths])
    assert (seen[:, 1:1801] - turned[:, 1:1801]).norm() > 0.5


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_differentiable_on_constant_images(value: float) -> None:
    images = torch.full((2, 1, 32, 32), value, requires_grad=True)
    features(feature_map(32), images).sum().backward()
    assert images.grad is not None
    assert torch.all(torch.isfinite(images.grad))


def test_differentiable_agrees_with_differences() -> None:
    fm = feature_map(28)
    rng = torch.Generator().manual_seed(3)
    image = torch.rand(1, 1, 28, 28, generator=rng) - 0.5
    direction = torch.randn(1, 1, 28, 28, generator=rng)
    weights = torch.randn(feature_dim(fm), generator=rng)
    image.requires_grad_()
    (features(fm, image) @ weights).sum().backward()
    assert image.grad is not None
    slope = (image.grad * direction).sum()
    step = 1e-3
    with torch.no_grad():
        rise = features(fm, image + step * direction) - features(fm, image - step * direction)
    assert torch.isclose(slope, (rise @ weights).sum() / (2 * step), rtol=0.02)


def blocks(fm: FeatureMap, images: Tensor) -> tuple[Tensor, Tensor]:
    """Cut out the low coefficients and their products, the last of a vector."""
    width = pairs(LOW_COSINES)
    assert width == 64 + 64 * 65 // 2
    return features(fm, images)[:, -width:].split([LOW_COSINES, width - LOW_COSINES], dim=1)


@pytest.mark.parametrize("side", [16, 28, 32])
def test_low_basis_is_orthonormal_and_begins_with_the_mean(side: int) -> None:
    basis = low_basis(side)
    assert basis.shape == (side * side, LOW_COSINES)
    assert torch.allclose(basis.T @ basis, torch.eye(LOW_COSINES), atol=1e-5)
    assert torch.allclose(basis[:, 0], torch.tensor(1 / side))
    frequencies = low_frequencies(side)
    assert len(set(frequencies)) == LOW_COSINES
    assert frequencies[:3] == [(0, 0), (0, 1), (1, 0)]
    radii = [down**2 + across**2 for down, across in frequencies]
    assert radii == sorted(radii)


def test_shrink_averages_larger_images_alone() -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shrink(images, 8), images)
    assert torch.equal(shrink(images, 32), images)
    assert torch.allclose(shrink(images, 4)[0, 0, 0, 0], images[0, 0, :2, :2].mean())


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 70), scale=st.floats(1e-3, 1e3))
def test_products_have_the_square_of_the_length(seed: int, width: int, scale: float) -> None:
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)) * scale
    together = products(vectors)
    assert together.shape[1] + width == pairs(width)
    assert torch.allclose(together.norm(dim=1), vectors.norm(dim=1).square(), rtol=1e-4)
    assert torch.allclose(together @ together.T, (vectors @ vectors.T).square(), rtol=1e-3, atol=1e-3 * scale**4)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_low_blocks_hold_their_shares_and_no_more(channels: int) -> None:
    images = torch.randn(4, channels, 28, 28, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    low, both = blocks(feature_map(28, channels), images)
    whole = 1 - CONSTANT**2
    assert torch.allclose(low.square().sum(dim=1), torch.tensor(whole * 0.25 / 3.75), rtol=1e-2)
    assert torch.allclose(both.square().sum(dim=1), torch.tensor(whole * 0.5 / 3.75), rtol=1e-2)


def test_the_low_blocks_see_low_frequencies_in_the_mean_of_the_channels() -> None:
    fm, colour = feature_map(28), torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, turned = blocks(feature_map(28, 3), colour), blocks(feature_map(28, 3), colour.flip(1))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, turned, strict=True))
    image = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(1)) - 0.5
    noise = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    fine = 0.2 * (noise - low_pass(noise))  # what no low cosine sees
    assert torch.allclose(blocks(fm, image)[0], blocks(fm, image + fine)[0], atol=1e-4)
    assert (blocks(fm, image)[0] - blocks(fm, image.flip(3))[0]).norm() > 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_differentiable_where_all_low_coefficients_are_nothing(channels: int) -> None:
    images = torch.zeros(2, channels, 28, 28, requires_grad=True)
    low, both = blocks(feature_map(28, channels), images)
    (low.sum() + both.sum()).backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.abs().max() > 0
