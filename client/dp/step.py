"""One private discriminator step: where privacy is made.

The mechanism is a Gaussian on a sum of clipped contributions, one for each sampled patient, over a public divisor.
Out of scope: who is sampled and when (client/train), what it costs (common/privacy), gradients (the engines).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from client.dp.packing import Batch
from client.dp.sums import Adder
from common.config import GradientEngine, PrivacyConfig, TrainConfig
from common.noise import to_public_grid

ROWS = (32, 64)
"""Images that pass D at a time: fewer where few patients are expected. Multiples of every kernel's width, so that no
row is treated as a remainder."""

_ROUNDING_OF_NORMS = 2.0**-12
_ROUNDING_OF_SUMS = 2.0**-20

Noise = Callable[[tuple[int, ...], float], Float64[Tensor, "..."]]
"""Draws fresh normal noise of a shape and a standard deviation, in double precision."""


@final
@dataclass(frozen=True)
class PrivateOptimizer:
    """A discriminator with its engines and its Adam, and the public numbers of the mechanism."""

    adder: Adder
    adam: torch.optim.Adam
    max_grad_norm: float
    noise_multiplier: float
    divisor: float

    @property
    def discriminator(self) -> nn.Module:
        """The network that is trained."""
        return self.adder.discriminator


def private_optimizer(
    discriminator: nn.Module,
    privacy: PrivacyConfig,
    train: TrainConfig,
    noise_multiplier: float,
    divisor: float,
    engine: GradientEngine = "fast",
    bf16: bool = False,
) -> PrivateOptimizer:
    """Choose an engine for a discriminator and give it an Adam.

    Args:
        discriminator: Layers that the engine knows; nothing that mixes images of a batch.
        privacy: The clipping norm.
        train: Learning rate.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        divisor: Public: expected sampled patients. The sum of reals and as many fakes is divided by twice this.
        engine: `fast`, or `opacus` for the reference; both give the same sums to the precision of a float.
        bf16: Let the fast engine's activations have eight bits.

    Raises:
        ConfigError: The fast engine does not know a layer; it is named.
    """
    adder = make_adder(discriminator, privacy, divisor, engine, bf16)
    adam = torch.optim.Adam(discriminator.parameters(), lr=train.learning_rate_d, betas=(0.5, 0.999), fused=True)
    return PrivateOptimizer(adder, adam, privacy.max_grad_norm, noise_multiplier, divisor)


def make_adder(
    discriminator: nn.Module,
    privacy: PrivacyConfig,
    divisor: float,
    engine: GradientEngine = "fast",
    bf16: bool = False,
) -> Adder:
    """Choose an engine for a discriminator, and how many images pass it at a time. Arguments as above.

    Raises:
        ConfigError: The fast engine does not know a layer; it is named.
    """
    rows = ROWS[0] if divisor < 1.5 * ROWS[1] else ROWS[1]
    return Adder(discriminator, engine, rows, privacy.max_grad_norm, bf16)


def private_step(
    private: PrivateOptimizer,
    batch: Batch,
    fakes: Float[Tensor, "fakes 1 size size"],
    fake_labels: Int64[Tensor, " fakes"],
    noise: Noise,
) -> None:
    """Take one step of D on the sampled patients and on fakes: Adam on `private_gradient`.

    Args:
        private: From `private_optimizer`.
        batch: The sampled patients' images; none is a legal batch.
        fakes: Generated images.
        fake_labels: Their classes.
        noise: Where the noise comes from: secret in deployment.
    """
    private_gradient(private, batch, fakes, fake_labels, noise)
    private.adam.step()
    private.adam.zero_grad(set_to_none=True)


def private_gradient(
    private: PrivateOptimizer,
    batch: Batch,
    fakes: Float[Tensor, "fakes 1 size size"],
    fake_labels: Int64[Tensor, " fakes"],
    noise: Noise,
) -> None:
    """Set the gradient of D: the clipped contributions and noise, over the public divisor. Arguments as above.

    Guarantees:
        - one_clipped_contribution: A patient's images move the sum by at most `max_grad_norm`, however many they are,
          and by rounding at most `rounding` of it more; the noise is larger by that much.
        - company_changes_nothing: The contribution of a patient is the same to the last bit whoever else was sampled,
          and a fake's whoever was: reals and fakes pass D apart, in chunks of one fixed shape. Otherwise weights chosen
          to magnify rounding would make one patient change the contributions of others.
        - public_divisor: The sum is divided by a constant that does not depend on the batch.
        - empty_batch_is_noise: With no patient sampled the step still adds the same noise.
        - always_finite: A contribution that overflows counts as zero, so weights made to overflow on some patient's
          images reveal nothing about who was sampled.
        - bounded_memory: Gradients of one chunk are held at a time, however many patients were sampled.
        - rounded_last: Chunks and noise are added in double precision and rounded once.

    Source: Abadi et al. 2016, algorithm 1, with patients as the unit; fakes are clipped like patients, as in
        Bie et al. 2023 (arXiv 2302.02936), which keeps the two halves of the loss in balance and costs nothing.
    """
    generated = Batch(fakes, fake_labels, torch.arange(len(fakes)), len(fakes))
    private.adder.prepare(fakes.shape[-1])
    total = private.adder.clipped_sum([(batch, loss_of_real), (generated, _loss_of_fake)])
    std = private.noise_multiplier * private.max_grad_norm * (1 + rounding(private.divisor))
    noisy = to_public_grid(total.add_(noise((len(total),), std).to(total.device, non_blocking=True)), std)
    gradient = noisy.div_(2 * private.divisor).float()
    parts = private.adder.by_parameter(gradient)
    for parameter, part in zip(private.discriminator.parameters(), parts, strict=True):
        parameter.grad = part


def rounding(divisor: float) -> float:
    """Return by what part of the clipping norm rounding may add to one patient's influence on the sum.

    Norms: less than 2^-12. Sums: 2^-20 for every patient who was sampled, of whom there are no more than twice as many
    as expected and 128, but for a chance below 2^-64, where the site does not declare far fewer patients than it has.

    Args:
        divisor: Expected sampled patients.
    """
    return _ROUNDING_OF_NORMS + _ROUNDING_OF_SUMS * (2 * divisor + 128)


def loss_of_real(logits: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return the discriminator's loss on real images, one number an image."""
    return F.softplus(-logits)


def _loss_of_fake(logits: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return F.softplus(logits)
