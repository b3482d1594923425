"""The generator's side of training: fakes, its step against a discriminator, its moving average.

No function here has a parameter that can hold a patient: all of it is post-processing of the discriminator. Sites use
it in local training, the coordinator with secure-sum.
"""

import hashlib

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from common.config import Proposal


def reproducible(seed: int, who: str, round_: int) -> torch.Generator:
    """Return the generator of a round, at a site or the coordinator, for all that is not secret: latents, fakes."""
    digest = hashlib.sha256(f"{seed}/{who}/{round_}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def generator_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer: torch.optim.Optimizer,
    proposal: Proposal,
    rng: torch.Generator,
) -> None:
    """Take one non-saturating step of G against D."""
    fakes, labels = draw_fakes(generator, proposal.train.generator_batch, proposal, rng)
    loss = F.softplus(-discriminator(fakes, labels)).mean()
    parameters = list(generator.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def draw_fakes(
    generator: nn.Module, count: int, proposal: Proposal, rng: torch.Generator
) -> tuple[Float[Tensor, "count channels size size"], Int64[Tensor, " count"]]:
    """Draw labels, latents and with them images from a generator; only `rng` is random."""
    labels = torch.randint(max(1, len(proposal.image.classes)), (count,), generator=rng)
    latents = torch.randn(count, proposal.model.latent_dim, generator=rng)
    return generator(latents, labels), labels


@torch.no_grad()
def move_average(averaged: nn.Module, generator: nn.Module, decay: float) -> None:
    """Move the averaged generator towards the current one, in place."""
    for mean, parameter in zip(averaged.parameters(), generator.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)
