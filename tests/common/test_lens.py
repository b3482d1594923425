"""A lens of the warm-up: bounded whatever it holds, differentiable, and read strictly."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ImageConfig
from common.errors import WireError
from common.features import CONSTANT
from common.lens import SIGHTS, Sight, coordinates, from_arrays, lens_dim, look, low_pass, make_network, to_arrays
from tests.hostile_requests import BAD_LENSES, HOSTILE_LENSES, make_lens

IMAGES = [
    ImageConfig(size=size, channels=channels, classes=("a", "b")) for size, channels in ((28, 1), (32, 3), (64, 1))
]
GREY = IMAGES[0]


def pixels(image: ImageConfig, count: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    shape = (count, image.channels, image.size, image.size)
    return (torch.randn(shape, generator=rng) * scale).clamp(-1, 1)


def assert_bounded(vectors: torch.Tensor) -> None:
    norms = vectors.double().norm(dim=1)
    assert torch.all((norms <= 1) | ~norms.isfinite())


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_unit_norm(image: ImageConfig, sight: Sight) -> None:
    extremes = [torch.full((1, image.channels, image.size, image.size), value) for value in (-1.0, 0.0, 1.0)]
    images = torch.cat([pixels(image, 3), pixels(image, 2, scale=1e6), *extremes])
    vectors = look(from_arrays(image, sight, make_lens(image, sight)), images, torch.arange(len(images)) % 2)
    assert vectors.shape == (len(images), lens_dim(image, sight))
    assert vectors.isfinite().all()
    assert_bounded(vectors)
    assert torch.allclose(vectors[:, 0], torch.tensor(CONSTANT))
    assert vectors.norm(dim=1).max() > 0.9  # and what there is, is used


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("how", HOSTILE_LENSES)
def test_unit_norm_through_a_hostile_lens(sight: Sight, how: str) -> None:
    lens = from_arrays(GREY, sight, HOSTILE_LENSES[how](make_lens(GREY, sight)))
    assert_bounded(look(lens, pixels(GREY, 4), torch.tensor([0, 1, 0, 1])))


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 2**31), centre=finite, scale=finite, weight=finite, sight=st.sampled_from(SIGHTS))
def test_unit_norm_of_any_lens(seed: int, centre: float, scale: float, weight: float, sight: Sight) -> None:
    factors = {"lens.centre": centre, "lens.scale": scale}
    with np.errstate(over="ignore", invalid="ignore"):
        arrays = {
            name: np.nan_to_num(array * np.float32(factors.get(name, weight)))
            for name, array in make_lens(GREY, sight).items()
        }
    assert_bounded(look(from_arrays(GREY, sight, arrays), pixels(GREY, 3, seed), torch.tensor([0, 1, 1])))


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, None])
def test_differentiable(sight: Sight, value: float | None) -> None:
    """At noise, at constant images, and where an image is exactly the centre: there the norm has a corner."""
    images = pixels(GREY, 2) if value is None else torch.full((2, 1, 28, 28), value)
    arrays = dict(make_lens(GREY, sight))
    for centre in (arrays["lens.centre"], _exact_centre(arrays, sight, images)):
        lens = from_arrays(GREY, sight, arrays | {"lens.centre": centre})
        pixels_ = images.clone().requires_grad_()
        weights = torch.randn(lens_dim(GREY, sight), generator=torch.Generator().manual_seed(1))
        (look(lens, pixels_, torch.tensor([0, 1])) @ weights).sum().backward()
        assert pixels_.grad is not None
        assert pixels_.grad.isfinite().all()
        assert pixels_.grad.abs().max() > 0


def _exact_centre(arrays: dict[str, Any], sight: Sight, images: torch.Tensor) -> np.ndarray:
    return coordinates(from_arrays(GREY, sight, arrays).network, images).numpy()


def test_the_classes_own_centre_is_taken_off() -> None:
    """An image that is its class's centre gives nothing but the constant; as of the other class it gives more."""
    images, arrays = pixels(GREY, 2), dict(make_lens(GREY, "learned"))
    lens = from_arrays(GREY, "learned", arrays | {"lens.centre": _exact_centre(arrays, "learned", images)})
    right, wrong = (look(lens, images, torch.tensor(labels)) for labels in ((0, 1), (1, 0)))
    assert right[:, 1:].abs().max() < 1e-3
    assert wrong[:, 1:].norm(dim=1).min() > 0.1


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_arrays_round_trip(image: ImageConfig, sight: Sight) -> None:
    arrays = make_lens(image, sight)
    lens = from_arrays(image, sight, arrays)
    assert lens.sight == sight
    again = to_arrays(lens)
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[name], array) and again[name].dtype == np.float32 for name, array in arrays.items())


def test_a_lens_that_was_read_does_not_follow_the_arrays_it_came_in() -> None:
    arrays = make_lens(GREY, "means")
    lens = from_arrays(GREY, "means", arrays)
    before = lens.centre.clone()
    arrays["lens.centre"][:] = 7.0
    assert torch.equal(lens.centre, before)


@pytest.mark.parametrize("how", BAD_LENSES)
def test_from_arrays_refuses_what_is_not_such_a_lens(how: str) -> None:
    with pytest.raises(WireError, match="Expected"):
        from_arrays(GREY, "learned", BAD_LENSES[how](make_lens(GREY, "learned")))


def test_from_arrays_refuses_the_other_sight_and_another_image() -> None:
    for sight, arrays in (("means", make_lens(GREY, "learned")), ("learned", make_lens(GREY, "means"))):
        with pytest.raises(WireError, match="named arrays"):
            from_arrays(GREY, sight, arrays)
    with pytest.raises(WireError, match="Expected lens"):
        from_arrays(GREY, "learned", make_lens(IMAGES[1], "learned"))


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, -2.0])
def test_a_scale_that_was_read_is_positive(scale: float) -> None:
    arrays = dict(make_lens(GREY, "means"))
    lens = from_arrays(GREY, "means", arrays | {"lens.scale": np.full_like(arrays["lens.scale"], scale)})
    assert torch.all(lens.scale == max(abs(scale), torch.finfo(torch.float32).tiny))


def test_reading_a_lens_moves_no_global_seed() -> None:
    arrays = make_lens(GREY, "learned")
    before = torch.random.get_rng_state()
    from_arrays(GREY, "learned", arrays)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_low_pass_is_a_projection(image: ImageConfig) -> None:
    images = pixels(image, 3)
    low = low_pass(images)
    assert low.shape == images.shape
    assert torch.allclose(low_pass(low), low, atol=1e-5)
    rest = (images - low).flatten(1)
    assert torch.all((low.flatten(1) * rest).sum(dim=1).abs() < 1e-2)
    assert torch.all(low.norm() < 0.9 * images.norm())  # noise has more than low frequencies
    flat = torch.full_like(images, 0.3)
    assert torch.allclose(low_pass(flat), flat, atol=1e-5)


def test_a_network_has_no_state_but_its_weights() -> None:
    """What travels is the named parameters: a buffer would be lost, or stay what a site drew."""
    for image in IMAGES:
        assert list(make_network(image).named_buffers()) == []
