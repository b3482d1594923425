"""The generator/discriminator pairs that a run can choose from."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from common.config import ImageConfig, ModelConfig
from common.models import dcgan, mlp


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
        image: The image size.
        number_of_classes: How many labels there are, at least 1.
        rng: The only source of the weights.

    Guarantees:
        - own_seed: Equal generator states give equal weights, and the global random state is neither read nor moved.
        - opacus_layers: The discriminator holds only layers whose per-sample gradients Opacus knows, each used once.
    """
    module = {"dcgan": dcgan, "mlp": mlp}[config.name]
    with torch.device("meta"):  # no weights are drawn here, so the global generator is left alone
        generator = module.Generator(image.size, number_of_classes, config.latent_dim, config.generator_width)
        discriminator = module.Discriminator(image.size, number_of_classes, config.discriminator_width)
    return Pair(_fill(generator, rng), _fill(discriminator, rng))


def _fill(model: nn.Module, rng: torch.Generator) -> nn.Module:
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
    return model
