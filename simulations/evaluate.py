"""Is the generator of use? A classifier trained on its images, tested on real patients that no hospital held.

Only the simulator can do this, since only it has such patients; the figures are outside the guarantee.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from client.intake import Dataset
from common.artefact import draw
from common.config import Config
from common.files import write_atomic

SYNTHETIC_IMAGES = 4000
REPEATS = 2
STEPS = 400
BATCH = 64
NOTE = (
    "A small CNN trained on synthetic images only, tested on real patients that no hospital held. Computed in the "
    "simulator, outside the guarantee."
)


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
    scores: list[tuple[float, float | None]] = []
    for _ in range(REPEATS):
        labels = torch.randint(len(config.image.classes), (SYNTHETIC_IMAGES,), generator=rng)
        images = draw(generator, labels, config.model.latent_dim, rng)
        classifier = train_classifier(images, labels, len(config.image.classes), rng)
        scores.append(_test(classifier, held_out))
    aucs = [auc for _, auc in scores if auc is not None]
    return Evaluation(
        float(np.mean(aucs)) if aucs else None,
        float(np.mean([accuracy for accuracy, _ in scores])),
        SYNTHETIC_IMAGES,
        held_out.number_of_patients,
        len(held_out.images),
        REPEATS,
    )


def save_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json."""
    write_atomic(path, (json.dumps(asdict(evaluation), indent=2) + "\n").encode())


def train_classifier(
    images: UInt8[np.ndarray, "images size size"], labels: Int64[Tensor, " images"], classes: int, rng: torch.Generator
) -> nn.Module:
    """Train a small CNN; its initial weights and batches depend on `rng` only."""
    model = _classifier(classes, images.shape[1])
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * (2 / fan_in) ** 0.5 * (parameter.dim() > 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs = _inputs(images)
    for _ in range(STEPS):
        chosen = torch.randint(len(inputs), (BATCH,), generator=rng)
        loss = F.cross_entropy(model(inputs[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def area_under_roc(scores: Float[np.ndarray, " images"], positive: np.ndarray) -> float:
    """Return the probability that a positive scores higher than a negative; ties count half."""
    wins = scores[positive][:, None] - scores[~positive][None, :]
    return float((wins > 0).mean() + 0.5 * (wins == 0).mean())


def _classifier(classes: int, size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (size // 4) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


@torch.no_grad()
def _test(classifier: nn.Module, held_out: Dataset) -> tuple[float, float | None]:
    inputs = _inputs(held_out.images[:, 0])
    logits = torch.cat([classifier(inputs[start : start + 512]) for start in range(0, len(inputs), 512)]).numpy()
    accuracy = float((logits.argmax(axis=1) == held_out.labels).mean())
    positive = held_out.labels == 1
    if logits.shape[1] != 2 or positive.all() or not positive.any():
        return accuracy, None
    return accuracy, area_under_roc(logits[:, 1] - logits[:, 0], positive)


def _inputs(images: UInt8[np.ndarray, "images size size"]) -> Float[Tensor, "images 1 size size"]:
    return torch.from_numpy(images)[:, None].float() / 127.5 - 1
