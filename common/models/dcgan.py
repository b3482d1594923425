"""A small convolutional pair.

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

from common.config import ImageConfig, ModelConfig

SLOPE = 0.2
_GROUPS = 8


def start_side(size: int) -> int:
    """Return the side in pixels that convolutions start from: 7 or 8, doubled as often as needed."""
    return 7 if size == 28 else 8


def widths_of_generator(size: int, width: int) -> list[int]:
    """Return the channels from the start up to half of `size`: one number for each convolution and one before."""
    doublings = (size // start_side(size)).bit_length() - 2
    return [4 * width, 2 * width, *[width] * doublings]


def widths_of_discriminator(size: int, width: int) -> list[int]:
    """Return the channels after each halving, down to 3 or 4 pixels."""
    halvings = (size // start_side(size)).bit_length()
    return [width, 2 * width, *[4 * width] * (halvings - 2)]


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a normalisation over groups of channels of one image; it mixes no images."""
    return nn.GroupNorm(gcd(_GROUPS, channels), channels)


@final
class Generator(nn.Module):
    """Latent and label to an image: a linear layer, convolutions up to half the size, then four sub-pixels for each.

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
        self.norms = nn.ModuleList(group_norm(channels) for channels in widths)
        self.convolutions = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths))
        self.to_pixels = nn.Conv2d(widths[-1], 4 * image.channels, 3, padding=1)

    def forward(
        self, latent: Float[Tensor, "batch latent"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels size size"]:
        """Return images in [-1, 1]."""
        onehot = F.one_hot(labels, self._classes).to(latent.dtype)
        hidden = self.start(torch.cat([latent, onehot], dim=1))
        hidden = hidden.unflatten(1, (-1, self._start, self._start)).contiguous(memory_format=torch.channels_last)
        hidden = F.leaky_relu(self.norms[0](hidden), SLOPE)
        for stage, (convolution, norm) in enumerate(zip(self.convolutions, self.norms[1:], strict=True)):
            if stage > 0:
                hidden = F.interpolate(hidden, scale_factor=2.0, mode="bilinear", align_corners=False)
            hidden = F.leaky_relu(norm(convolution(hidden)), SLOPE)
        return to_image(self.to_pixels(hidden))


@final
class Discriminator(nn.Module):
    """Image and label to a logit: three to five strided convolutions, the label as a bias after the first.

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
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.last = nn.Linear(widths[-1] * (image.size >> len(widths)) ** 2, 1)

    def forward(
        self, images: Float[Tensor, "batch channels size size"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch"]:
        """Return one logit per image, high for real."""
        hidden = F.leaky_relu(self.first(images) + self.label(labels)[:, :, None, None], SLOPE)
        for convolution in self.convolutions:
            hidden = F.leaky_relu(convolution(hidden), SLOPE)
        return self.last(hidden.flatten(1)).squeeze(1)


def to_image(subpixels: Float[Tensor, "batch 4*channels half half"]) -> Float[Tensor, "batch channels size size"]:
    """Put four sub-pixels for each place side by side, smooth, and bound to [-1, 1].

    The binomial filter passes nothing of a period of two pixels, so the sub-pixels leave no checkerboard.
    """
    images = F.pixel_shuffle(subpixels, 2)
    left = F.avg_pool2d(F.pad(images, (1, 0, 1, 0), mode="replicate"), 2, stride=1)
    return torch.tanh(F.avg_pool2d(F.pad(left, (0, 1, 0, 1), mode="replicate"), 2, stride=1))
