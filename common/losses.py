"""The losses of a pair, by the discriminator's logits, and what keeps a critic Lipschitz.

They are the same at a site, in local training, and at the coordinator, with secure-sum. Clipping, noise and what a
patient contributes do not depend on the loss: each is a number per image. Out of scope: gradients (client/dp).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from common.config import TrainConfig
from common.models import vae

Loss = Callable[[Float[Tensor, " rows"]], Float[Tensor, " rows"]]
"""Loss of each row from its logit."""

WEIGHT_BOUND = 2.0**-4
"""Every weight of a Wasserstein critic lies within plus and minus this: what bounds its slope. Public and fixed, so
that cutting noisy weights to it is post-processing. A penalty on the critic's slope at real images would be one more
query about patients."""


@final
@dataclass(frozen=True)
class Losses:
    """What is minimised.

    Attributes:
        of_real: By D, for a real image.
        of_fake: By D, for a fake; None where fakes play no part.
        of_generator: By G, for its fake.
        weight_bound: D's weights stay within plus and minus this; None: they are free.
    """

    of_real: Loss
    of_fake: Loss | None
    of_generator: Loss
    weight_bound: float | None = None


def losses_of(discriminator: nn.Module, train: TrainConfig) -> Losses:
    """Return the losses that train a discriminator and its generator.

    Args:
        discriminator: A private autoencoder's output is a bound on the evidence, and is raised; it meets no fakes.
        train: Names the loss of any other.

    Source: Goodfellow et al. 2014 (arXiv:1406.2661), non-saturating; Arjovsky et al. 2017 (arXiv:1701.07875).
    """
    return _EVIDENCE if isinstance(discriminator, vae.Discriminator) else _ADVERSARIAL[train.loss]


@torch.no_grad()
def bound_weights(discriminator: nn.Module, losses: Losses) -> None:
    """Cut the weights to the loss' public bound, in place, if it has one: after every step of D.

    Guarantees:
        - post_processing: Weights and the bound alone decide.
    """
    if losses.weight_bound is not None:
        for parameter in discriminator.parameters():
            parameter.clamp_(-losses.weight_bound, losses.weight_bound)


def _low_if_real(logits: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return F.softplus(-logits)


def _low_if_fake(logits: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return F.softplus(logits)


def _up(logits: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return -logits


def _down(logits: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return logits


_ADVERSARIAL: Mapping[str, Losses] = {
    "logistic": Losses(_low_if_real, _low_if_fake, _low_if_real),
    "wasserstein": Losses(_up, _down, _up, WEIGHT_BOUND),
}
_EVIDENCE = Losses(_up, None, _up)
