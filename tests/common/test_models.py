"""Generator/discriminator pairs: shapes, seeds, and what Opacus asks of a discriminator."""

import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from common.config import ImageConfig, ModelConfig
from common.models import Pair, build

NAMES = ("dcgan", "mlp")
SIZES = (28, 32, 64)
KNOWN_TO_OPACUS = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Embedding)


def make(name: str, size: int, classes: int = 3, seed: int = 0) -> Pair:
    config = ModelConfig.model_validate({"name": name, "latent_dim": 16, "generator_width": 8})
    image = ImageConfig.model_validate({"size": size})
    return build(config, image, classes, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", [1, 3])
def test_shapes(name: str, size: int, classes: int) -> None:
    pair = make(name, size, classes)
    labels = torch.arange(4) % classes
    images = pair.generator(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), labels)
    assert images.shape == (4, 1, size, size)
    assert images.dtype == torch.float32
    assert torch.all(images.abs() <= 1)
    assert pair.discriminator(images, labels).shape == (4,)


@pytest.mark.parametrize("name", NAMES)
def test_own_seed(name: str) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second, other = make(name, 28), make(name, 28), make(name, 28, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for one, same, different in zip(
        (first.generator, first.discriminator),
        (second.generator, second.discriminator),
        (other.generator, other.discriminator),
        strict=True,
    ):
        kept, again, changed = one.state_dict(), same.state_dict(), different.state_dict()
        assert all(torch.equal(kept[key], again[key]) for key in kept)
        assert any(not torch.equal(kept[key], changed[key]) for key in kept)
        assert all(torch.all(torch.isfinite(value)) for value in kept.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_label_matters(name: str) -> None:
    pair = make(name, 28)
    latent = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)).expand(3, 16)
    images = pair.generator(latent, torch.arange(3))
    assert not torch.allclose(images[0], images[1], atol=1e-4)
    logits = pair.discriminator(images[:1].expand(3, 1, 28, 28), torch.arange(3))
    assert len(set(logits.tolist())) == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
def test_opacus_layers(name: str, size: int) -> None:
    discriminator = make(name, size).discriminator
    layers = [layer for layer in discriminator.modules() if next(layer.parameters(recurse=False), None) is not None]
    assert all(isinstance(layer, KNOWN_TO_OPACUS) for layer in layers)
    calls: list[nn.Module] = []
    handles = [layer.register_forward_hook(lambda module, *_: calls.append(module)) for layer in layers]
    images = torch.rand(3, 1, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    labels = torch.tensor([0, 2, 2])
    discriminator(images, labels)
    assert sorted(map(id, calls)) == sorted(map(id, layers))
    for handle in handles:
        handle.remove()
    alone: list[list[torch.Tensor]] = []
    for row in range(3):
        discriminator.zero_grad()
        discriminator(images[row : row + 1], labels[row : row + 1]).sum().backward()
        alone.append([p.grad.clone() for p in discriminator.parameters() if p.grad is not None])
    discriminator.zero_grad()
    wrapped = GradSampleModule(discriminator, loss_reduction="sum")
    wrapped(images, labels).sum().backward()
    for index, parameter in enumerate(discriminator.parameters()):
        expected = torch.stack([gradients[index] for gradients in alone])
        assert torch.allclose(parameter.grad_sample, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [28, 32])
def test_default_discriminator_is_small(size: int) -> None:
    pair = build(ModelConfig(), ImageConfig.model_validate({"size": size}), 2, torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in pair.discriminator.parameters()) < 50_000
    assert sum(parameter.numel() for parameter in pair.generator.parameters()) < 700_000


@pytest.mark.parametrize("size", SIZES)
def test_dcgan_leaves_no_checkerboard(size: int) -> None:
    generator = make("dcgan", size).generator
    images = generator(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), torch.zeros(8, dtype=torch.long))
    inner = torch.atanh(images.detach().double().clamp(-0.999999, 0.999999))[..., 2:-2, 2:-2]
    signs = torch.arange(size - 4) % 2 * 2.0 - 1
    for pattern in (signs[:, None] * signs[None], signs[:, None].expand(size - 4, -1)):
        assert (inner * pattern).mean().abs() < 0.02 * inner.std()


@pytest.mark.parametrize("width", [9, 12, 20])
def test_any_width_of_the_configuration_builds(width: int) -> None:
    config = ModelConfig(generator_width=width, discriminator_width=width)
    pair = build(config, ImageConfig(size=28), 2, torch.Generator().manual_seed(0))
    images = pair.generator(torch.zeros(1, config.latent_dim), torch.zeros(1, dtype=torch.long))
    assert torch.all(torch.isfinite(pair.discriminator(images, torch.zeros(1, dtype=torch.long))))


def test_models_with_no_batch_norm_and_nothing_in_place() -> None:
    for name in NAMES:
        for model in (make(name, 28).generator, make(name, 28).discriminator):
            assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
            assert not any(getattr(layer, "inplace", False) for layer in model.modules())
