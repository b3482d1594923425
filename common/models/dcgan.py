"""A small convolutional pair for 28, 32 and 64 pixels.

The generator resizes, convolves and smooths, for a transposed convolution leaves a checkerboard. The discriminator is
built for per-sample gradients: no normalisation across patients, nothing in place, every layer used once.
"""

from itertools import pairwise
from math import gcd
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

_SLOPE = 0.2
_GROUPS = 8


@final
class Generator(nn.Module):
    """Latent and label to an image: a linear layer, convolutions up to half the size, then four sub-pixels for each.

    Args:
        size: Pixels along each side, a multiple of 4.
        number_of_classes: How many labels there are.
        latent_dim: Length of a latent vector.
        width: Channels at half size; four times as many at the start.
    """

    def __init__(self, size: int, number_of_classes: int, latent_dim: int, width: int) -> None:
        super().__init__()
        widths = [4 * width, 2 * width, width, width] if size >= 64 else [4 * width, 2 * width, width]
        self._start = size >> len(widths) - 1
        self._classes = number_of_classes
        self.start = nn.Linear(latent_dim + number_of_classes, widths[0] * self._start**2)
        self.norms = nn.ModuleList(nn.GroupNorm(gcd(_GROUPS, channels), channels) for channels in widths)
        self.convolutions = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths))
        self.to_pixels = nn.Conv2d(widths[-1], 4, 3, padding=1)

    def forward(
        self, latent: Float[Tensor, "batch latent"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch 1 size size"]:
        """Return images in [-1, 1]."""
        onehot = F.one_hot(labels, self._classes).to(latent.dtype)
        hidden = self.start(torch.cat([latent, onehot], dim=1))
        hidden = hidden.view(len(latent), -1, self._start, self._start).contiguous(memory_format=torch.channels_last)
        hidden = F.leaky_relu(self.norms[0](hidden), _SLOPE)
        for stage, (convolution, norm) in enumerate(zip(self.convolutions, self.norms[1:], strict=True)):
            if stage > 0:
                hidden = F.interpolate(hidden, scale_factor=2.0, mode="bilinear", align_corners=False)
            hidden = F.leaky_relu(norm(convolution(hidden)), _SLOPE)
        # The binomial filter passes nothing of a period of two pixels, so the four sub-pixels leave no checkerboard.
        return torch.tanh(_binomial(F.pixel_shuffle(self.to_pixels(hidden), 2)))


@final
class Discriminator(nn.Module):
    """Image and label to a logit: three or four strided convolutions, the label as a bias after the first.

    Args:
        size: Pixels along each side, a multiple of 4.
        number_of_classes: How many labels there are.
        width: Channels after the first convolution.
    """

    def __init__(self, size: int, number_of_classes: int, width: int) -> None:
        super().__init__()
        layers = 4 if size >= 64 else 3
        widths = [width, 2 * width, 4 * width, 4 * width][:layers]
        self.first = nn.Conv2d(1, width, 4, stride=2, padding=1)
        self.label = nn.Embedding(number_of_classes, width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.last = nn.Linear(widths[-1] * (size >> layers) ** 2, 1)

    def forward(
        self, images: Float[Tensor, "batch 1 size size"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch"]:
        """Return one logit per image, high for real."""
        hidden = F.leaky_relu(self.first(images) + self.label(labels)[:, :, None, None], _SLOPE)
        for convolution in self.convolutions:
            hidden = F.leaky_relu(convolution(hidden), _SLOPE)
        return self.last(hidden.flatten(1)).squeeze(1)


def _binomial(images: Float[Tensor, "batch 1 size size"]) -> Float[Tensor, "batch 1 size size"]:
    left = F.avg_pool2d(F.pad(images, (1, 0, 1, 0), mode="replicate"), 2, stride=1)
    return F.avg_pool2d(F.pad(left, (0, 1, 0, 1), mode="replicate"), 2, stride=1)
