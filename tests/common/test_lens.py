"""Lenses: never longer than 1, read strictly, made of public numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.config import ImageConfig
from common.errors import WireError
from common.features import CONSTANT
from common.lens import SIGHTS, Lens, Sight, from_arrays, lens_dim, look, low_pass, make_network, to_arrays
from common.models import draw_weights

IMAGE = ImageConfig(size=28, classes=("a", "b"))


def make_lens(sight: Sight, image: ImageConfig = IMAGE, size: float = 1.0) -> Lens:
    rng = torch.Generator().manual_seed(0)
    network = None
    if sight == "learned":
        with torch.device("meta"):
            network = make_network(image)
        network = draw_weights(network, rng).eval().requires_grad_(False)
    width = 64 * image.channels + (96 if network else 0)
    centre = torch.randn(len(image.classes), width, generator=rng)
    return Lens(image, centre * size, torch.rand(width, generator=rng) + 0.1, network)


def pictures(count: int, image: ImageConfig = IMAGE, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(count, image.channels, image.size, image.size, generator=rng) * 2 - 1


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    sight=st.sampled_from(SIGHTS),
    weights=st.sampled_from([0.0, 1.0, 1e4, 1e18]),
    scale=st.sampled_from([0.0, 1e-38, -3.0, 1.0, 1e30]),
    centre=st.sampled_from([0.0, 1.0, 1e20]),
)
def test_unit_norm(sight: Sight, weights: float, scale: float, centre: float) -> None:
    arrays = {name: array * np.float32(weights) for name, array in to_arrays(make_lens(sight)).items()}
    arrays["lens.scale"] = np.full_like(arrays["lens.scale"], scale)
    arrays["lens.centre"] = np.full_like(arrays["lens.centre"], centre)
    arrays = {name: np.nan_to_num(array) for name, array in arrays.items()}
    vectors = look(from_arrays(IMAGE, sight, arrays), pictures(6), torch.tensor([0, 1, 0, 1, 1, 0]))
    norms = vectors.norm(dim=1)
    assert vectors.shape == (6, lens_dim(IMAGE, sight))
    assert torch.all((norms <= 1) | ~norms.isfinite())


def test_an_honest_lens_gives_finite_vectors_with_the_constant_first() -> None:
    for sight in SIGHTS:
        vectors = look(make_lens(sight), pictures(4), torch.zeros(4, dtype=torch.int64))
        assert torch.all(vectors.isfinite())
        assert torch.allclose(vectors[:, 0], torch.tensor(CONSTANT))


def test_differentiable() -> None:
    for sight in SIGHTS:
        lens = make_lens(sight)
        images = torch.cat([pictures(2), torch.zeros(1, 1, 28, 28)]).requires_grad_()
        look(lens, images, torch.tensor([0, 1, 1])).square().sum().backward()
        assert images.grad is not None
        assert torch.all(images.grad.isfinite())


def test_each_class_is_seen_from_its_own_centre() -> None:
    lens, images = make_lens("means"), pictures(1)
    first, second = (look(lens, images, torch.tensor([label])) for label in (0, 1))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sight", SIGHTS)
def test_arrays_and_back(sight: Sight, channels: int) -> None:
    image = IMAGE.model_copy(update={"channels": channels})
    lens = make_lens(sight, image)
    again = from_arrays(image, sight, to_arrays(lens))
    labels = torch.tensor([0, 1, 1])
    assert again.sight == sight
    assert torch.equal(look(again, pictures(3, image), labels), look(lens, pictures(3, image), labels))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda arrays: arrays.pop("lens.scale"),
        lambda arrays: arrays.update(more=np.zeros(3, np.float32)),
        lambda arrays: arrays.update({"lens.centre": np.zeros((3, 160), np.float32)}),
        lambda arrays: arrays.update({"lens.scale": arrays["lens.scale"].astype(np.float64)}),
        lambda arrays: arrays["lens.network.0.weight"].fill(np.nan),
    ],
)
def test_arrays_of_another_form_are_refused(spoil) -> None:
    arrays = {name: array.copy() for name, array in to_arrays(make_lens("learned")).items()}
    spoil(arrays)
    with pytest.raises(WireError):
        from_arrays(IMAGE, "learned", arrays)


def test_low_pass_keeps_what_it_kept() -> None:
    once = low_pass(pictures(3))
    assert torch.allclose(low_pass(once), once, atol=1e-5)
    assert once.square().sum() < 0.5 * pictures(3).square().sum()
    flat = torch.full((1, 1, 28, 28), 0.3)
    assert torch.allclose(low_pass(flat), flat, atol=1e-5)
