"""The generator/discriminator pairs that a run can choose from."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from common.config import ImageConfig, ModelConfig
from common.errors import ConfigError
from common.models import dcgan, mlp, resnet, unet, vae

MAX_PARAMETERS = 1 << 27
"""Of both networks of a pair together: bounds what a proposal can make a site allocate, 512 MiB."""

_MODULES = {"dcgan": dcgan, "mlp": mlp, "resnet": resnet, "unet": unet, "vae": vae}


@final
@dataclass(frozen=True)
class Pair:
    """A generator (latent, labels) -> images and a discriminator (images, labels) -> logits."""

    generator: nn.Module
    discriminator: nn.Module


def build(config: ModelConfig, image: ImageConfig, number_of_classes: int, rng: torch.Generator) -> Pair:
    """Build the pair that a configuration names, with fresh weights.

    Args:
        config: Name, latent length and widths.
        image: Size and channels.
        number_of_classes: How many labels there are, at least 1.
        rng: The only source of the weights.

    Raises:
        ConfigError: The pair would have more than `MAX_PARAMETERS` weights.

    Guarantees:
        - own_seed: Equal generator states give equal weights, and the global random state is neither read nor moved.
        - opacus_layers: The discriminator holds only layers whose per-sample gradients Opacus knows, each used once.
        - bounded: Weights are counted before memory is taken for them.
    """
    empty = outline(config, image, number_of_classes)
    pair = Pair(draw_weights(empty.generator, rng), draw_weights(empty.discriminator, rng))
    vae.take_over_decoder(pair.discriminator, pair.generator)
    return pair


def outline(config: ModelConfig, image: ImageConfig, number_of_classes: int) -> Pair:
    """Build a pair that has shapes and no weights, and takes no memory for them; arguments as in `build`.

    Raises:
        ConfigError: The pair would have more than `MAX_PARAMETERS` weights.
    """
    module = _MODULES[config.name]
    with torch.device("meta"):  # no weights are drawn here, so the global generator is left alone
        generator = module.Generator(image, number_of_classes, config)
        discriminator = module.Discriminator(image, number_of_classes, config)
    count = sum(parameter.numel() for network in (generator, discriminator) for parameter in network.parameters())
    if count > MAX_PARAMETERS:
        raise ConfigError(
            f"Expected at most {MAX_PARAMETERS:,} weights of model.name={config.name} at {image.size} pixels, got "
            f"{count:,}. Lower model.generator_width or model.discriminator_width."
        )
    return Pair(generator, discriminator)


def draw_weights(model: nn.Module, rng: torch.Generator) -> nn.Module:
    """Give a model that has shapes only its first weights, from `rng` alone."""
    model.to_empty(device="cpu")
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=rng)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.1, generator=rng)
        elif isinstance(layer, nn.GroupNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
    for buffer in model.buffers():
        nn.init.zeros_(buffer)
    return model
