"""A sheet of a run's images that nobody picked by hand: the first, the best and the worst of many of each class.

Best and worst by a classifier that learned the classes from other images of the same generator: surest and least
sure of the class that was asked for. It reads no patient. Out of scope: how good images are (simulations/evaluate).
"""

from pathlib import Path

import numpy as np
import torch

from common.artefact import draw, load_generator
from common.errors import ConfigError
from common.sheets import COLUMNS, save_rows
from simulations.evaluate import apply, train_classifier

OF_EACH_CLASS = 200
"""Images of a class among which the best and the worst are looked for."""
_SEED = 20_261_127


def save_gallery(run: Path, path: Path, learned_from: int = 4000) -> None:
    """Draw a run's gallery: three rows a class.

    Args:
        run: A finished run.
        path: The PNG.
        learned_from: How many images of all classes the classifier learns from.

    Raises:
        ConfigError: The run has one class only, so nothing ranks its images.
        ResumeError: No generator stands in the run.
        StorageError: The file could not be written.

    Guarantees:
        - same_again: The same run gives the same sheet, for equal thread counts.
    """
    generator, info = load_generator(run)
    classes = info.image.classes
    if len(classes) < 2:
        raise ConfigError(f"Expected a run of at least 2 classes to rank its images by, got {len(classes)}.")
    rng = torch.Generator().manual_seed(_SEED)
    learned = torch.arange(learned_from) % len(classes)
    classifier = train_classifier(draw(generator, learned, info.model.latent_dim, rng), learned, len(classes), rng)
    names: list[str] = []
    rows: list[np.ndarray] = []
    for number, name in enumerate(classes):
        images = draw(generator, torch.full((OF_EACH_CLASS,), number), info.model.latent_dim, rng)
        sure = torch.from_numpy(apply(classifier, images)).log_softmax(dim=1)[:, number]
        order = sure.argsort(descending=True, stable=True).numpy()
        names += [f"{name}: first", f"{name}: best", f"{name}: worst"]
        rows += [images[:COLUMNS], images[order[:COLUMNS]], images[order[::-1][:COLUMNS]]]
    save_rows(path, names, np.stack(rows))
