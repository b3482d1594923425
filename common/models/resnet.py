"""A residual pair: two convolutions and a short cut in each block.

The discriminator has no normalisation at all; short cuts carry its gradients. Sizes and channels are those of `dcgan`.
"""

from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.config import ImageConfig, ModelConfig
from common.models.dcgan import (
    SLOPE,
    group_norm,
    start_side,
    to_image,
    widths_of_discriminator,
    widths_of_generator,
)

_HALF = 0.5**0.5
"""Keeps the variance of the sum of two branches that of one."""


@final
class Generator(nn.Module):
    """Latent and label to an image: a linear layer, residual blocks up to half the size, four sub-pixels for each.

    Args:
        image: Size and channels.
        number_of_classes: How many labels there are.
        config: Latent length, and as `generator_width` the channels at half size; four times as many at the start.
    """

    def __init__(self, image: ImageConfig, number_of_classes: int, config: ModelConfig) -> None:
        super().__init__()
        widths = widths_of_generator(image.size, config.generator_width)
        self._start, self._classes = start_side(image.size), number_of_classes
        self.start = nn.Linear(config.latent_dim + number_of_classes, widths[0] * self._start**2)
        self.blocks = nn.ModuleList(_Up(before, after) for before, after in pairwise(widths))
        self.norm = group_norm(widths[-1])
        self.to_pixels = nn.Conv2d(widths[-1], 4 * image.channels, 3, padding=1)

    def forward(
        self, latent: Float[Tensor, "batch latent"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels size size"]:
        """Return images in [-1, 1]."""
        onehot = F.one_hot(labels, self._classes).to(latent.dtype)
        hidden = self.start(torch.cat([latent, onehot], dim=1))
        hidden = hidden.unflatten(1, (-1, self._start, self._start)).contiguous(memory_format=torch.channels_last)
        for stage, block in enumerate(self.blocks):
            if stage > 0:
                hidden = F.interpolate(hidden, scale_factor=2.0, mode="bilinear", align_corners=False)
            hidden = block(hidden)
        return to_image(self.to_pixels(F.leaky_relu(self.norm(hidden), SLOPE)))


@final
class Discriminator(nn.Module):
    """Image and label to a logit: one strided convolution with the label as a bias, then blocks that halve the side.

    Args:
        image: Size and channels.
        number_of_classes: How many labels there are.
        config: As `discriminator_width` the channels after the first convolution.
    """

    def __init__(self, image: ImageConfig, number_of_classes: int, config: ModelConfig) -> None:
        super().__init__()
        widths = widths_of_discriminator(image.size, config.discriminator_width)
        self.first = nn.Conv2d(image.channels, widths[0], 4, stride=2, padding=1)
        self.label = nn.Embedding(number_of_classes, widths[0])
        self.blocks = nn.ModuleList(_Down(before, after) for before, after in pairwise(widths))
        self.last = nn.Linear(widths[-1] * (image.size >> len(widths)) ** 2, 1)

    def forward(
        self, images: Float[Tensor, "batch channels size size"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch"]:
        """Return one logit per image, high for real."""
        hidden = self.first(images) + self.label(labels)[:, :, None, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(F.leaky_relu(hidden, SLOPE).flatten(1)).squeeze(1)


@final
class _Up(nn.Module):
    """A residual block of the generator; the side stays, the caller doubles it."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([group_norm(before), group_norm(after)])
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)]
        )
        self.short_cut = nn.Conv2d(before, after, 1)

    def forward(self, hidden: Float[Tensor, "batch before side side"]) -> Float[Tensor, "batch after side side"]:
        """Return the mean of both branches, scaled to their variance."""
        long = hidden
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            long = convolution(F.leaky_relu(norm(long), SLOPE))
        return (long + self.short_cut(hidden)) * _HALF


@final
class _Down(nn.Module):
    """A residual block of the discriminator without normalisation; it halves the side."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(before, before, 3, padding=1), nn.Conv2d(before, after, 4, stride=2, padding=1)]
        )
        self.short_cut = nn.Conv2d(before, after, 1)

    def forward(self, hidden: Float[Tensor, "batch before side side"]) -> Float[Tensor, "batch after half half"]:
        """Return the mean of both branches, scaled to their variance."""
        long = hidden
        for convolution in self.convolutions:
            long = convolution(F.leaky_relu(long, SLOPE))
        return (long + self.short_cut(F.avg_pool2d(hidden, 2))) * _HALF
