"""A conditional variational autoencoder in the form of a pair: the comparison that has no adversary.

The generator is the decoder. In the discriminator's place stands the private network: an encoder and a decoder of its
own, whose output for an image is the image's evidence lower bound, high for what it knows well. The private step
raises it; the generator takes the trained decoder over (common/generator_step).

Source: Kingma and Welling 2014 (arXiv:1312.6114); Sohn et al. 2015 (conditional).
"""

from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.config import ImageConfig, ModelConfig
from common.models.dcgan import SLOPE, widths_of_discriminator
from common.models.dcgan import Generator as Generator

PIXEL_STD = 0.3
"""Deviation of a pixel around the decoder's image, in the bound's Gaussian likelihood; pixels lie in [-1, 1]."""


@final
class Discriminator(nn.Module):
    """Image and label to the image's evidence lower bound in nats for each pixel, up to a constant.

    Args:
        image: Size and channels.
        number_of_classes: How many labels there are.
        config: As `discriminator_width` the channels after the encoder's first convolution; the rest is the decoder's.

    Guarantees:
        - one_noise_for_all: The noise of the reparameterisation is one public vector, the same for every image of a
          step: what an image gives depends neither on its place nor on its company. `renew_noise` draws it anew, from a
          source that need not be secret: the bound on a patient holds for any value of it.
        - finite_std: The posterior is never wider than the prior, so no ordinary weights make the bound overflow.
    """

    noise: Tensor

    def __init__(self, image: ImageConfig, number_of_classes: int, config: ModelConfig) -> None:
        super().__init__()
        widths = widths_of_discriminator(image.size, config.discriminator_width)
        self.first = nn.Conv2d(image.channels, widths[0], 4, stride=2, padding=1)
        self.label = nn.Embedding(number_of_classes, widths[0])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths)
        )
        encoded = widths[-1] * (image.size >> len(widths)) ** 2
        self.mean, self.narrowness = nn.Linear(encoded, config.latent_dim), nn.Linear(encoded, config.latent_dim)
        self.decoder = Generator(image, number_of_classes, config)
        self.register_buffer("noise", torch.zeros(config.latent_dim), persistent=False)

    def forward(
        self, images: Float[Tensor, "batch channels size size"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch"]:
        """Return each image's bound under the noise of this step."""
        hidden = F.leaky_relu(self.first(images) + self.label(labels)[:, :, None, None], SLOPE)
        for convolution in self.convolutions:
            hidden = F.leaky_relu(convolution(hidden), SLOPE)
        mean, log_std = self.mean(hidden.flatten(1)), -F.softplus(self.narrowness(hidden.flatten(1)))
        std = log_std.exp()
        decoded = self.decoder(mean + std * self.noise, labels)
        misfit = (images - decoded).square().flatten(1).sum(1) / (2 * PIXEL_STD**2)
        divergence = ((mean.square() + std.square() - 1) / 2 - log_std).sum(1)
        return -(misfit + divergence) / images.shape[1:].numel()


def renew_noise(discriminator: nn.Module, rng: torch.Generator) -> None:
    """Draw the noise of a private autoencoder anew for a step; any other discriminator holds none and draws nothing.

    Args:
        discriminator: Changed in place.
        rng: Reproducible and public.
    """
    if isinstance(discriminator, Discriminator):
        discriminator.noise.copy_(torch.randn(len(discriminator.noise), generator=rng))


def take_over_decoder(discriminator: nn.Module, generator: nn.Module) -> None:
    """Give a private autoencoder's decoder the generator's weights; any other discriminator stays as it is."""
    if isinstance(discriminator, Discriminator):
        discriminator.decoder.load_state_dict(generator.state_dict())
