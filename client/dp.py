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
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from common.config import PrivacyConfig, TrainConfig
from common.crypto import KeyStream
from common.noise import gaussian

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
    """A discriminator with per-sample hooks and the optimiser that holds its gradients, divides and steps."""

    discriminator: nn.Module
    hooks: GradSampleHooks
    optimizer: DPOptimizer
    noise_multiplier: float


def private_optimizer(
    discriminator: nn.Module, privacy: PrivacyConfig, train: TrainConfig, noise_multiplier: float, divisor: float
) -> PrivateOptimizer:
    """Attach hooks and a private Adam to a discriminator.

    Args:
        discriminator: Layers that Opacus' hooks know; nothing that mixes images of a batch.
        privacy: The clipping norm.
        train: Learning rate.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        divisor: Public: expected sampled patients. The sum of reals and as many fakes is divided by twice this.

    Returns:
        The pair to hand to `private_step`; the hooks are off outside of it.
    """
    hooks = GradSampleHooks(discriminator, loss_reduction="sum")
    hooks.disable_hooks()
    plain = torch.optim.Adam(discriminator.parameters(), lr=train.learning_rate_d, betas=(0.5, 0.999))
    optimizer = DPOptimizer(
        plain,
        noise_multiplier=noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=2 * divisor,  # type: ignore[arg-type]  # Opacus only divides by it
    )
    return PrivateOptimizer(discriminator, hooks, optimizer, noise_multiplier)


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
        fakes: At least one generated image.
        fake_labels: Their classes.
        secret: The source of the noise.
    """
    private_gradient(private, batch, fakes, fake_labels, secret)
    private.optimizer.original_optimizer.step()
    private.optimizer.zero_grad(set_to_none=True)


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
        - public_divisor: The sum is divided by a constant that does not depend on the batch.
        - empty_batch_is_noise: With no patient sampled the step still adds the same noise.
        - always_finite: A coordinate of a contribution that overflows counts as zero, so weights made to overflow on
          some patient's images reveal nothing about who was sampled.

    Source: Abadi et al. 2016, algorithm 1, with patients as the unit; fakes are clipped like patients, as in
        Bie et al. 2023 (arXiv 2302.02936), which keeps the two halves of the loss in balance and costs nothing.
    """
    optimizer = private.optimizer
    optimizer.zero_grad(set_to_none=True)
    private.hooks.enable_hooks()
    logits = private.discriminator(torch.cat([batch.images, fakes]), torch.cat([batch.labels, fake_labels]))
    real, fake = logits.split([len(batch.images), len(fakes)])
    (F.softplus(-real).sum() + F.softplus(fake).sum()).backward()
    private.hooks.disable_hooks()
    rows = _rows(batch, len(fakes))
    contributions = [_by_patient(grad_sample, rows, batch, len(fakes)) for grad_sample in optimizer.grad_samples]
    factors = _clip_factors(contributions, optimizer.max_grad_norm)
    std = private.noise_multiplier * optimizer.max_grad_norm
    for parameter, contribution in zip(optimizer.params, contributions, strict=True):
        clipped_sum = torch.einsum("i,i...", factors, contribution)
        parameter.grad = clipped_sum + gaussian(secret, tuple(parameter.shape), std)
    optimizer.scale_grad()


def _rows(batch: Batch, fakes: int) -> Int64[Tensor, " rows"]:
    """Number the contribution that each image belongs to: its patient's, or the fake's own."""
    return torch.cat([batch.patients, batch.number_of_patients + torch.arange(fakes)])


def _by_patient(
    grad_sample: Float[Tensor, "images *shape"], rows: Int64[Tensor, " images"], batch: Batch, fakes: int
) -> Float[Tensor, "contributions *shape"]:
    """Average the per-image gradients of each patient, before anything is clipped; what overflows becomes zero."""
    if not torch.equal(batch.patients, torch.arange(batch.number_of_patients)):  # else one row a patient already
        counts = torch.bincount(rows, minlength=batch.number_of_patients + fakes).clamp(min=1)
        sums = grad_sample.new_zeros((batch.number_of_patients + fakes, *grad_sample.shape[1:]))
        sums.index_add_(0, rows, grad_sample)
        grad_sample = sums / counts.view(-1, *[1] * (grad_sample.dim() - 1))
    return torch.nan_to_num(grad_sample, nan=0.0, posinf=0.0, neginf=0.0)  # last, for a sum may overflow too


def _clip_factors(contributions: list[Tensor], max_grad_norm: float) -> Float[Tensor, " contributions"]:
    """Return what shortens each contribution to the clipping norm; 0 for one too long to be shortened exactly.

    Norms of blocks in single precision, put together in double. Opacus takes the whole in single: over 16 million
    weights it can come out so short that the clipped contribution is 6 % too long, if the coordinator makes them so.
    """
    blocks = [block for part in contributions for block in part.flatten(1).split(_BLOCK, dim=1)]
    norm = torch.stack([torch.linalg.vector_norm(block, dim=1) for block in blocks]).double().norm(dim=0)
    return torch.where(norm < _LONGEST, max_grad_norm / norm.clamp(min=max_grad_norm), 0.0).float()
