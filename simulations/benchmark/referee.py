"""Who judges generated images: one classifier recipe and one feature space, fixed in code for every row of a table.

The feature space is learned from the real training images of all sites together, which only a simulator has: its
figures are outside the guarantee. Out of scope: running federations (simulations/benchmark/quality).
"""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import nn

from client.intake import Dataset
from common.artefact import draw, pictures
from common.config import Config
from simulations.benchmark.frechet import Moments, frechet_distance, moments
from simulations.evaluate import FULL, Scores, Training, apply, score, train_classifier

FEATURE_SEED = 0


@final
@dataclass(frozen=True)
class Effort:
    """How thoroughly images are judged; the same for all rows of a table.

    Attributes:
        training: Of every classifier.
        synthetic_images: Generated images that a classifier learns from, as many of each class.
        frechet_images: Generated images in a Frechet distance, at least; classes as among the held-out patients.
    """

    training: Training = FULL
    synthetic_images: int = 20_000
    frechet_images: int = 10_000


@final
@dataclass(frozen=True)
class Judgement:
    """What the referee says of one set of images."""

    scores: Scores
    frechet: float


@final
@dataclass(frozen=True)
class Referee:
    """The fixed feature space, and what real images score in it.

    Attributes:
        held_out: Patients that no site has.
        features: Images to the penultimate layer of the classifier that was trained on real images.
        reference: Moments of the held-out images' features.
        real: The same classifier on held-out patients (TRTR), and the distance of real training images.
        effort: How thoroughly generated images are judged.
    """

    held_out: Dataset
    features: nn.Module
    reference: Moments
    real: Judgement
    effort: Effort


def make_referee(
    images: UInt8[np.ndarray, "images size size *colours"],
    labels: Int64[np.ndarray, " images"],
    held_out: Dataset,
    classes: int,
    effort: Effort,
) -> Referee:
    """Train the reference classifier on real images, and judge them.

    Args:
        images: The training images of all sites together.
        labels: Their class numbers.
        held_out: Patients that no site has.
        classes: How many there are.
        effort: How thoroughly all images are judged.

    Guarantees:
        - held_out_unseen: The classifier and its features depend on the training images alone.
    """
    rng = torch.Generator().manual_seed(FEATURE_SEED)
    classifier = train_classifier(images, torch.from_numpy(labels), classes, rng, effort.training)
    features = classifier[:-1]
    reference = moments(apply(features, pictures(held_out.images[:])))
    distance = frechet_distance(moments(apply(features, images)), reference)
    real = Judgement(score(classifier, pictures(held_out.images[:]), held_out.labels), distance)
    return Referee(held_out, features, reference, real, effort)


def judge(referee: Referee, config: Config, generator: nn.Module) -> Judgement:
    """Train a classifier on generated images and test it on held-out patients; and tell how far the images are.

    Args:
        referee: From `make_referee`.
        config: Of the run; its classes, latent length and seed.
        generator: What the run learned.
    """
    rng = torch.Generator().manual_seed(config.federation.seed + 2)
    classes = len(config.image.classes)
    labels = torch.arange(referee.effort.synthetic_images) % classes
    images = draw(generator, labels, config.model.latent_dim, rng)
    classifier = train_classifier(images, labels, classes, rng, referee.effort.training)
    scores = score(classifier, pictures(referee.held_out.images[:]), referee.held_out.labels)
    return Judgement(scores, _distance(referee, config, generator, rng))


def _distance(referee: Referee, config: Config, generator: nn.Module, rng: torch.Generator) -> float:
    labels = np.tile(referee.held_out.labels, math.ceil(referee.effort.frechet_images / len(referee.held_out.labels)))
    images = draw(generator, torch.from_numpy(labels), config.model.latent_dim, rng)
    return frechet_distance(moments(apply(referee.features, images)), referee.reference)
