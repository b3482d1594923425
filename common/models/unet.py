"""A U-Net as the generator, with the discriminator of `dcgan`.

A U-Net maps an image to an image; a generator starts from a vector. So the latent and the label become a noise image
first, by one linear layer, which also gives every place its position; the encoder reads it, and each of its stages
is handed to the decoder at the same side.
"""

from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.config import ImageConfig, ModelConfig
from common.models.dcgan import SLOPE, group_norm, to_image, widths_of_generator
from common.models.dcgan import Discriminator as Discriminator

_NOISE_CHANNELS = 4


@final
class Generator(nn.Module):
    """Latent and label to a noise image at half the size, down to 7 or 8 pixels, up again, four sub-pixels for each.

    Args:
        image: Size and channels.
        number_of_classes: How many labels there are.
        config: Latent length, and as `generator_width` the channels at half size; up to four times as many below.
    """

    def __init__(self, image: ImageConfig, number_of_classes: int, config: ModelConfig) -> None:
        super().__init__()
        self._side, self._classes = image.size // 2, number_of_classes
        up = widths_of_generator(image.size, config.generator_width)[1:]  # bottom first
        down = up[::-1]
        self.noise = nn.Linear(config.latent_dim + number_of_classes, _NOISE_CHANNELS * self._side**2)
        self.first = nn.Conv2d(_NOISE_CHANNELS, down[0], 3, padding=1)
        self.down = nn.ModuleList(_Stage(before, after, halve=True) for before, after in pairwise(down))
        self.bottom = _Stage(down[-1], up[0], halve=False)
        self.up = nn.ModuleList(_Stage(before + after, after, halve=False) for before, after in pairwise(up))
        self.to_pixels = nn.Conv2d(up[-1], 4 * image.channels, 3, padding=1)

    def forward(
        self, latent: Float[Tensor, "batch latent"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels size size"]:
        """Return images in [-1, 1]."""
        onehot = F.one_hot(labels, self._classes).to(latent.dtype)
        noise = self.noise(torch.cat([latent, onehot], dim=1)).unflatten(1, (-1, self._side, self._side))
        hidden = F.leaky_relu(self.first(noise.contiguous(memory_format=torch.channels_last)), SLOPE)
        skips: list[Tensor] = []
        for stage in self.down:
            skips.append(hidden)
            hidden = stage(hidden)
        hidden = self.bottom(hidden)
        for stage in self.up:
            larger = F.interpolate(hidden, scale_factor=2.0, mode="bilinear", align_corners=False)
            hidden = stage(torch.cat([larger, skips.pop()], dim=1))
        return to_image(self.to_pixels(hidden))


@final
class _Stage(nn.Module):
    """A convolution, a normalisation within each image, an activation."""

    def __init__(self, before: int, after: int, halve: bool) -> None:
        super().__init__()
        kernel, stride = (4, 2) if halve else (3, 1)
        self.convolution = nn.Conv2d(before, after, kernel, stride=stride, padding=1)
        self.norm = group_norm(after)

    def forward(self, hidden: Float[Tensor, "batch before side side"]) -> Float[Tensor, "batch after out out"]:
        """Return the activations."""
        return F.leaky_relu(self.norm(self.convolution(hidden)), SLOPE)
