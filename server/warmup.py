"""Fit the generator to the noisy sums of the warm-up: post-processing, free of privacy cost.

Out of scope: asking for the sums and adding them (server/rounds), what was looked at (common/features, common/lens).
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from common.config import WarmupConfig
from common.features import CONSTANT
from common.generator_step import move_average
from common.lens import low_pass
from common.look import Vectors

_Images = Float[Tensor, "batch channels size size"]

_EMA_DECAY = 0.95
_WINDOWS = 40
"""A step's gradient compares the noisy means with those of the fakes of the last steps, a fortieth of all, not with
those of its own few fakes: a third of the distance after equal time (docs/decisions/0012)."""
_CREDIBLE = 2.0
"""A class counts as far as its noisy count exceeds this many standard deviations of its noise."""
Detail = Literal["free", "alike", "kept"]
"""What may become of fine detail, beyond the lowest cosines, at equal latents: anything; it stays equal between the
classes; or it stays what it is in each image as the fit begins."""
_LIKENESS = 1.0
"""Weight of the squared difference in fine detail, where that must not be free: there is nothing but noise to fit."""


@final
@dataclass(frozen=True)
class Progress:
    """One step of the fit: its number from 1, and the squared distance to the noisy means (noise included)."""

    step: int
    loss: float


@final
@dataclass(frozen=True)
class Target:
    """What the generator is fitted to.

    Attributes:
        vectors: Images of known classes to vectors, as the sites computed them.
        means: A mean vector per class.
        weights: How much each class counts; they add up to 1, or to 0 when every class drowns in noise.
        precision: Of this release among others: one over the variance of its noise.
    """

    vectors: Vectors
    means: Float[Tensor, "classes dim"]
    weights: Float[Tensor, " classes"]
    precision: float


def target(vectors: Vectors, noisy_sum: Float[Tensor, "classes dim"], noise_std: float) -> Target:
    """Turn noisy sums into class means, without any exact count.

    Args:
        vectors: What was summed.
        noisy_sum: The sum over all sites.
        noise_std: Standard deviation of the noise in each of its coordinates; public.

    Guarantees:
        - drowned_class: A class whose noisy count is within its noise has weight 0.
        - floor: No sum is divided by less than the noise of a count.
    """
    count_std = noise_std / CONSTANT
    counts = noisy_sum[:, 0] / CONSTANT
    means = noisy_sum / counts.clamp(min=max(count_std, 1.0))[:, None]
    credible = (counts - _CREDIBLE * count_std).clamp(min=0)
    weights = credible / credible.sum().clamp(min=1e-12)
    return Target(vectors, means.float(), weights.float(), 1 / noise_std**2)


def fit_generator(
    generator: nn.Module,
    targets: Sequence[Target],
    config: WarmupConfig,
    latent_dim: int,
    rng: torch.Generator,
    detail: Detail = "free",
) -> Iterator[Progress]:
    """Fit the generator, in place, to the class means of all releases so far; yield after every step.

    Args:
        generator: Maps (latent, labels) to images in [-1, 1].
        targets: One a release, of the same classes.
        config: Steps, batch size and learning rate.
        latent_dim: Length of a latent vector.
        rng: The only source of randomness.
        detail: What the releases may do to fine detail, of which they may say little.

    Yields:
        The step and its loss; the generator is ready when the iterator is exhausted, and not before.

    Guarantees:
        - deterministic: Equal arguments, generator states and thread counts give equal weights, bit for bit.
        - nothing_learned: When every class drowns in noise the generator stays as it is.
    """
    total = sum(target.precision for target in targets)
    shares = [target.precision / total for target in targets]
    credible = sum(share * target.weights for share, target in zip(shares, targets, strict=True))
    classes = torch.nonzero(torch.as_tensor(credible)).flatten()
    if len(classes) == 0:
        return
    per_class = max(2, config.batch_size // len(classes))
    labels = classes.repeat_interleave(per_class)
    average, remembered = deepcopy(generator), list[Tensor]()
    begun = deepcopy(generator).requires_grad_(False) if detail == "kept" else None
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.learning_rate, betas=(0.5, 0.99))
    for step in range(1, config.steps + 1):
        optimizer.param_groups[0]["lr"] = config.learning_rate * _schedule(step, config.steps)
        latent = torch.randn(per_class, latent_dim, generator=rng).repeat(len(classes), 1)
        images = generator(latent, labels)
        means = [_class_means(target.vectors(images, labels), len(classes)) for target in targets]
        remembered = _remember(remembered, means, min(max(0.0, 1 - _WINDOWS / config.steps), 1 - 1 / step))
        loss = torch.zeros(())
        for share, target, now, before in zip(shares, targets, means, remembered, strict=True):
            pull = 2 * (before - target.means[classes]) * now  # has the gradient of |before - means|^2
            loss = loss + share * (target.weights[classes] * pull.sum(dim=1)).sum()
        if detail != "free":
            as_it_was = _mean_over_classes(images, len(classes)) if begun is None else begun(latent, labels)
            loss = loss + _LIKENESS * _fine(images - as_it_was).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        move_average(average, generator, min(_EMA_DECAY, 1 - 1 / step))
        yield Progress(step, _distance(targets, shares, remembered, classes))
    generator.load_state_dict(average.state_dict())


def _class_means(vectors: Float[Tensor, "batch dim"], classes: int) -> Float[Tensor, "classes dim"]:
    return vectors.view(classes, -1, vectors.shape[1]).mean(dim=1)


def _remember(before: Sequence[Tensor], now: Sequence[Tensor], decay: float) -> list[Tensor]:
    if not before:
        return [means.detach() for means in now]
    return [decay * old + (1 - decay) * means.detach() for old, means in zip(before, now, strict=True)]


def _mean_over_classes(images: _Images, classes: int) -> _Images:
    by_class = images.view(classes, -1, *images.shape[1:])
    return by_class.mean(dim=0, keepdim=True).expand_as(by_class).flatten(0, 1)


def _fine(images: _Images) -> _Images:
    return images - low_pass(images)


@torch.no_grad()
def _distance(
    targets: Sequence[Target], shares: Sequence[float], means: Sequence[Tensor], classes: Int64[Tensor, " classes"]
) -> float:
    squares = [(now - goal.means[classes]).square().sum(dim=1) for goal, now in zip(targets, means, strict=True)]
    parts = [
        share * float((goal.weights[classes] * square).sum())
        for share, goal, square in zip(shares, targets, squares, strict=True)
    ]
    return sum(parts)


def _schedule(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
