"""A pair of small fully connected networks: fast, for tests and as a baseline."""

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.config import ImageConfig, ModelConfig

_SLOPE = 0.2


@final
class Generator(nn.Module):
    """Latent and label to an image through two hidden layers of 8 x `generator_width`."""

    def __init__(self, image: ImageConfig, number_of_classes: int, config: ModelConfig) -> None:
        super().__init__()
        self._shape, self._classes = (image.channels, image.size, image.size), number_of_classes
        width = 8 * config.generator_width
        self.first = nn.Linear(config.latent_dim + number_of_classes, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, image.channels * image.size**2)

    def forward(
        self, latent: Float[Tensor, "batch latent"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels size size"]:
        """Return images in [-1, 1]."""
        onehot = F.one_hot(labels, self._classes).to(latent.dtype)
        hidden = F.leaky_relu(self.first(torch.cat([latent, onehot], dim=1)), _SLOPE)
        hidden = F.leaky_relu(self.second(hidden), _SLOPE)
        return torch.tanh(self.last(hidden)).view(-1, *self._shape)


@final
class Discriminator(nn.Module):
    """Image and label to a logit through two hidden layers of 4 x `discriminator_width`."""

    def __init__(self, image: ImageConfig, number_of_classes: int, config: ModelConfig) -> None:
        super().__init__()
        width = 4 * config.discriminator_width
        self.first = nn.Linear(image.channels * image.size**2, width)
        self.label = nn.Embedding(number_of_classes, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)

    def forward(
        self, images: Float[Tensor, "batch channels size size"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch"]:
        """Return one logit per image, high for real."""
        hidden = F.leaky_relu(self.first(images.flatten(1)) + self.label(labels), _SLOPE)
        hidden = F.leaky_relu(self.second(hidden), _SLOPE)
        return self.last(hidden).squeeze(1)
