"""Fit the generator to the noisy sums of the warm-up: post-processing, free of privacy cost.

Out of scope: asking for the sums and adding them (server/rounds), the features themselves (common/features).
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.config import WarmupConfig
from common.features import CONSTANT, FeatureMap, features
from common.generator_step import move_average

_EMA_DECAY = 0.95
_CREDIBLE = 2.0
"""A class counts as far as its noisy count exceeds this many standard deviations of its noise."""


@final
@dataclass(frozen=True)
class Progress:
    """One step of the fit: its number from 1, and the squared distance to the noisy means (noise included)."""

    step: int
    loss: float


@final
@dataclass(frozen=True)
class Target:
    """What the generator is fitted to: a mean per class and how much it weighs."""

    means: Float[Tensor, "classes dim"]
    weights: Float[Tensor, "classes"]


def target(noisy_sum: Float[Tensor, "classes dim"], noise_std: float) -> Target:
    """Turn noisy sums into class means, without any exact count.

    Args:
        noisy_sum: The sum over all sites.
        noise_std: Standard deviation of the noise in each of its coordinates; public.

    Returns:
        Means divided by noisy counts, and weights that add up to 1 (or to 0 when every class drowns in noise).

    Guarantees:
        - drowned_class: A class whose noisy count is within its noise has weight 0.
        - floor: No sum is divided by less than the noise of a count.
    """
    count_std = noise_std / CONSTANT
    counts = noisy_sum[:, 0] / CONSTANT
    means = noisy_sum / counts.clamp(min=max(count_std, 1.0))[:, None]
    credible = (counts - _CREDIBLE * count_std).clamp(min=0)
    return Target(means.float(), (credible / credible.sum().clamp(min=1e-12)).float())


def fit_generator(
    generator: nn.Module,
    noisy_sum: Float[Tensor, "classes dim"],
    noise_std: float,
    fm: FeatureMap,
    config: WarmupConfig,
    latent_dim: int,
    rng: torch.Generator,
) -> Iterator[Progress]:
    """Fit the generator, in place, to the class means behind the noisy sums; yield after every step.

    Args:
        generator: Maps (latent, labels) to images in [-1, 1].
        noisy_sum: The sum over all sites.
        noise_std: Standard deviation of the noise in each of its coordinates; public.
        fm: The public feature map.
        config: Steps, batch size and learning rate.
        latent_dim: Length of a latent vector.
        rng: The only source of randomness.

    Yields:
        The step and its loss; the generator is ready when the iterator is exhausted, and not before.

    Guarantees:
        - deterministic: Equal arguments, generator states and thread counts give equal weights, bit for bit.
        - nothing_learned: When every class drowns in noise the generator stays as it is.
    """
    goal = target(noisy_sum, noise_std)
    classes = torch.nonzero(goal.weights).flatten()
    if len(classes) == 0:
        return
    per_class = max(2, config.batch_size // len(classes))
    labels = classes.repeat_interleave(per_class)
    average = deepcopy(generator)
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.learning_rate, betas=(0.5, 0.99))
    for step in range(1, config.steps + 1):
        optimizer.param_groups[0]["lr"] = config.learning_rate * _schedule(step, config.steps)
        latent = torch.randn(len(labels), latent_dim, generator=rng)
        vectors = features(fm, generator(latent, labels)).view(len(classes), per_class, -1)
        loss = _distance(vectors, goal.means[classes], goal.weights[classes])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        move_average(average, generator, min(_EMA_DECAY, 1 - 1 / step))
        yield Progress(step, loss.item())
    generator.load_state_dict(average.state_dict())


def _distance(
    vectors: Float[Tensor, "classes per_class dim"],
    means: Float[Tensor, "classes dim"],
    weights: Float[Tensor, "classes"],
) -> Float[Tensor, ""]:
    # |mean|^2 of few samples favours samples that are all alike; without the pairs (i, i) it does not.
    count = vectors.shape[1]
    own = (vectors.mean(dim=1).square() * count**2).sum(dim=1) - vectors.square().sum(dim=(1, 2))
    cross = (vectors.mean(dim=1) * means).sum(dim=1)
    return (weights * (own / (count * (count - 1)) - 2 * cross + means.square().sum(dim=1))).sum()


def _schedule(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
