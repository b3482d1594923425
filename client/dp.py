"""One private discriminator step: where privacy is made. The engine is Opacus' per-sample gradient hooks.

The mechanism is a Gaussian on a sum of clipped contributions, one for each sampled patient, over a public divisor.
Out of scope: who is sampled and when (client/train), what it costs (common/privacy). Only client/train imports this.
"""

import warnings
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import Tensor, nn

from common.config import PrivacyConfig, TrainConfig
from common.crypto import KeyStream
from common.noise import gaussian

ROWS = 32
"""Images that pass D at a time. A multiple of every kernel's width, so that no row is treated as a remainder."""

_BLOCK = 4096
_LONGEST = 1e18  # beyond, the factor nears the smallest floats and is no longer exact

# Opacus' hooks sit on the first layer too, whose input, an image, needs no gradient; torch says so at every step.
warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)


@final
@dataclass(frozen=True)
class Batch:
    """The images of the sampled patients, in [-1, 1]; may be empty.

    Attributes:
        images: One row an image.
        labels: Class numbers.
        patients: Row of the patient in this batch, 0 ... number_of_patients - 1.
        number_of_patients: Sampled patients. Sensitive: never leaves the step.
    """

    images: Float[Tensor, "images 1 size size"]
    labels: Int64[Tensor, " images"]
    patients: Int64[Tensor, " images"]
    number_of_patients: int


@final
@dataclass(frozen=True)
class PrivateOptimizer:
    """A discriminator with per-sample hooks, its Adam, and the public numbers of the mechanism."""

    discriminator: nn.Module
    hooks: GradSampleHooks
    adam: torch.optim.Adam
    max_grad_norm: float
    noise_multiplier: float
    divisor: float


def private_optimizer(
    discriminator: nn.Module, privacy: PrivacyConfig, train: TrainConfig, noise_multiplier: float, divisor: float
) -> PrivateOptimizer:
    """Attach hooks and an Adam to a discriminator.

    Args:
        discriminator: Layers that Opacus' hooks know; nothing that mixes images of a batch.
        privacy: The clipping norm.
        train: Learning rate.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        divisor: Public: expected sampled patients. The sum of reals and as many fakes is divided by twice this.

    Returns:
        What `private_step` takes; the hooks are off outside of it.
    """
    hooks = GradSampleHooks(discriminator, loss_reduction="sum")
    hooks.disable_hooks()
    adam = torch.optim.Adam(discriminator.parameters(), lr=train.learning_rate_d, betas=(0.5, 0.999))
    return PrivateOptimizer(discriminator, hooks, adam, privacy.max_grad_norm, noise_multiplier, divisor)


def private_step(
    private: PrivateOptimizer,
    batch: Batch,
    fakes: Float[Tensor, "fakes 1 size size"],
    fake_labels: Int64[Tensor, " fakes"],
    secret: KeyStream,
) -> None:
    """Take one step of D on the sampled patients and on fakes: Adam on `private_gradient`.

    Args:
        private: From `private_optimizer`.
        batch: The sampled patients' images; none is a legal batch.
        fakes: Generated images.
        fake_labels: Their classes.
        secret: The source of the noise.
    """
    private_gradient(private, batch, fakes, fake_labels, secret)
    private.adam.step()
    private.adam.zero_grad(set_to_none=True)


def private_gradient(
    private: PrivateOptimizer,
    batch: Batch,
    fakes: Float[Tensor, "fakes 1 size size"],
    fake_labels: Int64[Tensor, " fakes"],
    secret: KeyStream,
) -> None:
    """Set the gradient of D: the clipped contributions and noise, over the public divisor. Arguments as above.

    Guarantees:
        - one_clipped_contribution: A patient's images move the sum by at most `max_grad_norm`, however many they are.
        - company_changes_nothing: The gradient of an image is the same to the last bit whoever else was sampled, and a
          fake's whoever was: reals and fakes pass D apart, in chunks of one fixed shape. Otherwise weights chosen to
          magnify rounding would make one patient change the contributions of others.
        - public_divisor: The sum is divided by a constant that does not depend on the batch.
        - empty_batch_is_noise: With no patient sampled the step still adds the same noise.
        - always_finite: A coordinate of a contribution that overflows counts as zero, so weights made to overflow on
          some patient's images reveal nothing about who was sampled.
        - bounded_memory: Gradients of at most 32 images are held at a time, however many patients were sampled.
        - rounded_last: Sum and noise are added in double precision and rounded once.

    Source: Abadi et al. 2016, algorithm 1, with patients as the unit; fakes are clipped like patients, as in
        Bie et al. 2023 (arXiv 2302.02936), which keeps the two halves of the loss in balance and costs nothing.
    """
    order = torch.argsort(batch.patients, stable=True)
    of_patients = _clipped_sum(private, batch.images[order], batch.labels[order], batch.patients[order], real=True)
    of_fakes = _clipped_sum(private, fakes, fake_labels, torch.arange(len(fakes)), real=False)
    std = private.noise_multiplier * private.max_grad_norm
    for parameter, reals, generated in zip(private.discriminator.parameters(), of_patients, of_fakes, strict=True):
        noise = gaussian(secret, tuple(parameter.shape), std)
        parameter.grad = ((reals + generated + noise) / (2 * private.divisor)).float()


def _clipped_sum(
    private: PrivateOptimizer,
    images: Float[Tensor, "images 1 size size"],
    labels: Int64[Tensor, " images"],
    owners: Int64[Tensor, " images"],
    real: bool,
) -> list[Tensor]:
    """Clip each owner's mean gradient and add them up in double precision; an owner's images are adjacent."""
    totals = [torch.zeros(p.shape, dtype=torch.float64) for p in private.discriminator.parameters()]
    images_of = torch.bincount(owners).clamp(min=1)
    carried: list[Tensor] | None = None
    for start in range(0, len(images), ROWS):
        chunk = slice(start, start + ROWS)
        gradients = _image_gradients(private, images[chunk], labels[chunk], real)
        first, last = int(owners[start]), int(owners[chunk][-1])
        rows = owners[chunk] - first
        if last - first + 1 == len(rows):  # one image each, nothing to add up
            sums = gradients
        else:
            sums = [g.new_zeros((last - first + 1, *g.shape[1:])).index_add_(0, rows, g) for g in gradients]
        if carried is not None:
            for part, before in zip(sums, carried, strict=True):
                part[0] += before
        goes_on = start + ROWS < len(images) and int(owners[start + ROWS]) == last
        carried = [part[-1].clone() for part in sums] if goes_on else None
        whole = len(sums[0]) - int(goes_on)
        divisors = images_of[first : first + whole]
        # Last, for a sum may overflow too.
        means = [torch.nan_to_num(part[:whole] / _column(divisors, part), 0.0, 0.0, 0.0) for part in sums]
        factors = _clip_factors(means, private.max_grad_norm)
        for total, mean in zip(totals, means, strict=True):
            total += torch.einsum("i,i...", factors, mean.double())
    return totals


def _image_gradients(
    private: PrivateOptimizer, images: Float[Tensor, "images 1 size size"], labels: Int64[Tensor, " images"], real: bool
) -> list[Tensor]:
    """Return the gradient of D's loss on each image; D always sees `ROWS` of them, the rest are blank."""
    blank = ROWS - len(images)
    padded = torch.cat([images, images.new_zeros((blank, *images.shape[1:]))])
    private.hooks.enable_hooks()
    logits = private.discriminator(padded, torch.cat([labels, labels.new_zeros(blank)]))
    F.softplus(-logits if real else logits).sum().backward()
    private.hooks.disable_hooks()
    gradients: list[Tensor] = []
    for parameter in private.discriminator.parameters():
        gradients.append(getattr(parameter, "grad_sample")[: len(images)])  # noqa: B009  # Opacus' own attribute
        setattr(parameter, "grad_sample", None)  # noqa: B010
        parameter.grad = None
    return gradients


def _column(values: Int64[Tensor, " rows"], like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _clip_factors(contributions: list[Tensor], max_grad_norm: float) -> Float[Tensor, " contributions"]:
    """Return what shortens each contribution to the clipping norm; 0 for one too long to be shortened exactly.

    Norms of blocks in single precision, put together in double. Opacus takes the whole in single: over 16 million
    weights it can come out so short that the clipped contribution is 6 % too long, if the coordinator makes them so.
    """
    blocks = [block for part in contributions for block in part.flatten(1).split(_BLOCK, dim=1)]
    norm = torch.stack([torch.linalg.vector_norm(block, dim=1) for block in blocks]).double().norm(dim=0)
    return torch.where(norm < _LONGEST, max_grad_norm / norm.clamp(min=max_grad_norm), 0.0)
