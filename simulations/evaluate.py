"""Is the generator of use? A classifier trained on its images, tested on real patients that no hospital held.

Only the simulator can do this, since only it has such patients; the figures are outside the guarantee.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from client.intake import Dataset
from common.artefact import draw, pictures
from common.config import Config
from common.files import write_atomic

SYNTHETIC_IMAGES = 4000
REPEATS = 2
LEARNING_RATE = 2e-3
SHIFT_PX = 1
"""Every batch is moved by up to this many pixels, real or synthetic."""
NOTE = (
    "A small CNN trained on synthetic images only, tested on real patients that no hospital held. Computed in the "
    "simulator, outside the guarantee."
)


@final
@dataclass(frozen=True)
class Training:
    """How long a classifier learns."""

    steps: int
    batch: int


BRIEF = Training(steps=150, batch=64)
"""After a simulation, where a person waits."""
FULL = Training(steps=1000, batch=128)
"""In the quality benchmark: 99 % on MNIST, an AUC of 0.99 on chest X-rays, when trained on real images."""


@final
@dataclass(frozen=True)
class Scores:
    """A classifier on real images; the area under the ROC curve only where two classes are there."""

    accuracy: float
    auc: float | None


@final
@dataclass(frozen=True)
class Evaluation:
    """Train on synthetic, test on real: means over the repeats."""

    tstr_auc: float | None
    tstr_accuracy: float
    synthetic_images: int
    held_out_patients: int
    held_out_images: int
    repeats: int
    note: str = NOTE


def evaluate(config: Config, generator: nn.Module, held_out: Dataset) -> Evaluation:
    """Train classifiers on generated images and test them on held-out patients.

    Args:
        config: Classes, sizes, seed, threads.
        generator: The run's result.
        held_out: Patients that no hospital got.

    Returns:
        Accuracy, and for two classes the area under the ROC curve.
    """
    torch.set_num_threads(config.performance.threads)
    rng = torch.Generator().manual_seed(config.federation.seed + 2)
    scores: list[Scores] = []
    for _ in range(REPEATS):
        labels = torch.randint(len(config.image.classes), (SYNTHETIC_IMAGES,), generator=rng)
        images = draw(generator, labels, config.model.latent_dim, rng)
        classifier = train_classifier(images, labels, len(config.image.classes), rng)
        scores.append(score(classifier, pictures(held_out.images[:]), held_out.labels))
    aucs = [one.auc for one in scores if one.auc is not None]
    return Evaluation(
        float(np.mean(aucs)) if aucs else None,
        float(np.mean([one.accuracy for one in scores])),
        SYNTHETIC_IMAGES,
        held_out.number_of_patients,
        len(held_out.images),
        REPEATS,
    )


def save_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json."""
    write_atomic(path, (json.dumps(asdict(evaluation), indent=2) + "\n").encode())


def train_classifier(
    images: UInt8[np.ndarray, "images size size *colours"],
    labels: Int64[Tensor, " images"],
    classes: int,
    rng: torch.Generator,
    training: Training = BRIEF,
) -> nn.Sequential:
    """Train a small CNN on images that are moved by a pixel now and then.

    Args:
        images: Grey or colour, 0 to 255, as `draw` gives them.
        labels: Class numbers.
        classes: How many there are.
        rng: The only source of randomness.
        training: How long.

    Returns:
        The classifier, ready to be asked; its last layer is linear.

    Guarantees:
        - deterministic: Equal arguments, generator states and thread counts give equal weights.
    """
    model = _classifier(classes, *_inputs(torch.from_numpy(images[:1])).shape[1:3])
    _initialise(model, rng)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    pixels = torch.from_numpy(images)
    for step in range(training.steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / training.steps))
        chosen = torch.randint(len(pixels), (training.batch,), generator=rng)
        loss = F.cross_entropy(model(_shifted(_inputs(pixels[chosen]), rng)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def score(
    classifier: nn.Module, images: UInt8[np.ndarray, "images size size *colours"], labels: Int64[np.ndarray, " images"]
) -> Scores:
    """Test a classifier on images."""
    logits = apply(classifier, images)
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    positive = labels == 1
    if logits.shape[1] != 2 or positive.all() or not positive.any():
        return Scores(accuracy, None)
    return Scores(accuracy, area_under_roc(logits[:, 1] - logits[:, 0], positive))


@torch.no_grad()
def apply(
    model: nn.Module, images: UInt8[np.ndarray, "images size size *colours"], batch: int = 512
) -> Float[np.ndarray, "images outputs"]:
    """Return a network's outputs for images, a batch at a time."""
    return torch.cat([model(_inputs(part)) for part in torch.from_numpy(images).split(batch)]).numpy()


def area_under_roc(scores: Float[np.ndarray, " images"], positive: np.ndarray) -> float:
    """Return the probability that a positive scores higher than a negative; ties count half."""
    wins = scores[positive][:, None] - scores[~positive][None, :]
    return float((wins > 0).mean() + 0.5 * (wins == 0).mean())


def _classifier(classes: int, channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (size // 8) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


@torch.no_grad()
def _initialise(model: nn.Module, rng: torch.Generator) -> None:
    """Draw the weights from `rng` alone, after He et al. (2015); biases start at 0."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.zero_()
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * (2 / parameter[0].numel()) ** 0.5)


def _shifted(
    inputs: Float[Tensor, "images channels size size"], rng: torch.Generator
) -> Float[Tensor, "images channels size size"]:
    """Move a whole batch by one draw; the border is repeated."""
    size = inputs.shape[-1]
    top, left = torch.randint(2 * SHIFT_PX + 1, (2,), generator=rng).tolist()
    padded = F.pad(inputs, (SHIFT_PX,) * 4, mode="replicate")
    return padded[:, :, top : top + size, left : left + size]


def _inputs(images: UInt8[Tensor, "images size size *colours"]) -> Float[Tensor, "images channels size size"]:
    planes = images[:, None] if images.ndim == 3 else images.movedim(3, 1)
    return planes.float() / 127.5 - 1
