"""A pair of small fully connected networks: fast, for tests and as a baseline."""

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

_SLOPE = 0.2


@final
class Generator(nn.Module):
    """Latent and label to an image through two hidden layers of 8 x `width`."""

    def __init__(self, size: int, number_of_classes: int, latent_dim: int, width: int) -> None:
        super().__init__()
        self._size, self._classes = size, number_of_classes
        self.first = nn.Linear(latent_dim + number_of_classes, 8 * width)
        self.second = nn.Linear(8 * width, 8 * width)
        self.last = nn.Linear(8 * width, size**2)

    def forward(
        self, latent: Float[Tensor, "batch latent"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch 1 size size"]:
        """Return images in [-1, 1]."""
        onehot = F.one_hot(labels, self._classes).to(latent.dtype)
        hidden = F.leaky_relu(self.first(torch.cat([latent, onehot], dim=1)), _SLOPE)
        hidden = F.leaky_relu(self.second(hidden), _SLOPE)
        return torch.tanh(self.last(hidden)).view(-1, 1, self._size, self._size)


@final
class Discriminator(nn.Module):
    """Image and label to a logit through two hidden layers of 4 x `width`."""

    def __init__(self, size: int, number_of_classes: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(size**2, 4 * width)
        self.label = nn.Embedding(number_of_classes, 4 * width)
        self.second = nn.Linear(4 * width, 4 * width)
        self.last = nn.Linear(4 * width, 1)

    def forward(
        self, images: Float[Tensor, "batch 1 size size"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch"]:
        """Return one logit per image, high for real."""
        hidden = F.leaky_relu(self.first(images.flatten(1)) + self.label(labels), _SLOPE)
        hidden = F.leaky_relu(self.second(hidden), _SLOPE)
        return self.last(hidden).squeeze(1)
