"""Generator/discriminator pairs: shapes, seeds, and what Opacus asks of a discriminator."""

from typing import get_args

import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from common.config import IMAGE_SIZES, ImageConfig, ModelConfig, ModelName
from common.errors import ConfigError
from common.models import MAX_PARAMETERS, Pair, build, outline
from common.models.vae import PIXEL_STD, renew_noise, take_over_decoder
from common.weights import get_weights

NAMES = get_args(ModelName)
SIZES = IMAGE_SIZES
KNOWN_TO_OPACUS = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Embedding)


def make(name: str, size: int, classes: int = 3, seed: int = 0, channels: int = 1) -> Pair:
    config = ModelConfig.model_validate({"name": name, "latent_dim": 16, "generator_width": 8})
    image = ImageConfig.model_validate({"size": size, "channels": channels})
    return build(config, image, classes, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("classes", "channels"), [(1, 1), (3, 3)])
def test_shapes(name: str, size: int, classes: int, channels: int) -> None:
    pair = make(name, size, classes, channels=channels)
    labels = torch.arange(4) % classes
    images = pair.generator(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), labels)
    assert images.shape == (4, channels, size, size)
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
    if name == "vae":  # whose decoder has channels last, which Opacus needs help with: tests/client/dp
        return
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
@pytest.mark.parametrize("name", ["dcgan", "resnet", "unet"])
def test_no_checkerboard(name: str, size: int) -> None:
    generator = make(name, size).generator
    images = generator(torch.randn(32, 16, generator=_rng(1)), torch.zeros(32, dtype=torch.long))
    inner = torch.atanh(images.detach().double().clamp(-0.999999, 0.999999))[..., 2:-2, 2:-2]
    signs = torch.arange(size - 4) % 2 * 2.0 - 1
    for pattern in (signs[:, None] * signs[None], signs[:, None].expand(size - 4, -1)):
        assert (inner * pattern).mean().abs() < inner.std() / (size - 4)  # what one edge of the window may add


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


EARLIER = {
    ("dcgan", 28): (0.14444304383577758, 0.08538332386524417),
    ("dcgan", 32): (-0.13129677264093687, -0.17987507209181786),
    ("dcgan", 64): (-0.11387957771718504, 0.27284861728549004),
    ("mlp", 28): (0.006810017390975821, -0.20220260322093964),
    ("mlp", 32): (0.006315900499288318, 0.6749116629362106),
    ("mlp", 64): (0.0006134150713670294, -1.0456184595823288),
}
"""Mean of two images and sum of D's last weights for one seed, computed before there were other sizes and channels."""


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in ("dcgan", "mlp") for size in (28, 32, 64)])
def test_grey_models_of_earlier_releases_keep_their_weights(name: str, size: int) -> None:
    pair = build(ModelConfig.model_validate({"name": name}), ImageConfig.model_validate({"size": size}), 3, _rng(7))
    mean = pair.generator(torch.ones(2, 64), torch.tensor([0, 2])).double().mean().item()
    total = pair.discriminator.get_parameter("last.weight").double().sum().item()
    assert (mean, total) == pytest.approx(EARLIER[name, size], rel=1e-4)


def test_a_pair_that_is_too_large_is_refused_before_memory_is_taken() -> None:
    image = ImageConfig(size=128, channels=3)
    large = ModelConfig(name="vae", latent_dim=1024, generator_width=256, discriminator_width=256)
    with pytest.raises(ConfigError, match=r"at most 134,217,728 weights of model\.name=vae at 128 pixels"):
        build(large, image, 64, _rng(0))
    largest = outline(large.model_copy(update={"name": "dcgan"}), image, 64)
    assert sum(p.numel() for p in largest.generator.parameters()) < MAX_PARAMETERS
    assert all(parameter.is_meta for parameter in largest.generator.parameters())


def test_private_autoencoder_gives_the_evidence_lower_bound() -> None:
    pair = make("vae", 28)
    network = pair.discriminator
    images, labels = torch.rand(3, 1, 28, 28, generator=_rng(3)) * 2 - 1, torch.arange(3)
    renew_noise(network, _rng(4))
    noise = torch.randn(16, generator=_rng(4))
    seen: dict[str, torch.Tensor] = {}
    for name in ("mean", "narrowness"):
        layer = network.get_submodule(name)
        layer.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    bound = network(images, labels)
    std = torch.exp(-torch.nn.functional.softplus(seen["narrowness"]))
    posterior = torch.distributions.Normal(seen["mean"], std)
    decoded = pair.generator(seen["mean"] + std * noise, labels)  # the decoder starts as the generator
    likelihood = torch.distributions.Normal(decoded, PIXEL_STD)
    constant = torch.distributions.Normal(0.0, PIXEL_STD).log_prob(torch.tensor(0.0)) * 784
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    expected = (likelihood.log_prob(images).sum((1, 2, 3)) - constant - divergence) / 784
    torch.testing.assert_close(bound, expected)
    assert (std <= 1).all()


def test_one_noise_for_all_and_no_other_model_draws_any() -> None:
    for name in NAMES:
        discriminator, rng = make(name, 28).discriminator, _rng(4)
        images = torch.rand(1, 1, 28, 28, generator=_rng(3)).expand(5, -1, -1, -1)
        labels = torch.zeros(5, dtype=torch.int64)
        before = discriminator(images, labels)
        renew_noise(discriminator, rng)
        after = discriminator(images, labels)
        assert torch.equal(rng.get_state(), _rng(4).get_state()) == (name != "vae")
        assert torch.equal(before, after) == (name != "vae")
        torch.testing.assert_close(after, after[:1].expand(5))


def test_noise_is_no_weight_and_the_decoder_follows_the_generator() -> None:
    pair, other = make("vae", 28), make("vae", 28, seed=1)
    assert not [name for name in get_weights(pair) if "noise" in name]
    take_over_decoder(pair.discriminator, other.generator)
    decoder = pair.discriminator.get_submodule("decoder")
    for mine, theirs in zip(decoder.parameters(), other.generator.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
