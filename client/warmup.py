"""The bounded sums of the warm-up: one vector per patient, added up by class. Out of scope: noise (client/agent)."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from common.errors import IntakeError
from common.look import Look

_CHUNK = 64
"""Images that pass a map together, where this machine computes the same, to the last bit, at every place of them."""

_DRAWS = 3


def embedding_sum(
    images: UInt8[np.ndarray, "images channels size size"],
    labels: Int[np.ndarray, "images"],
    patients: Shaped[np.ndarray, "images"],
    number_of_classes: int,
    look: Look,
) -> Float[Tensor, "classes dim"]:
    """Add up every patient's mean of onehot(class) x vector. Private until noise is added.

    Args:
        images: Pixels, 0 to 255, as many channels as the map is for.
        labels: Class number of each image, below `number_of_classes`.
        patients: What tells the patients apart, of any sortable type.
        number_of_classes: Rows of the sum.
        look: Images to vectors; nothing of it is taken on trust.

    Returns:
        The sum in double precision; column 0 holds `CONSTANT` times the patients of the class.

    Raises:
        IntakeError: A label is not a class number.

    Guarantees:
        - one_patient_one_unit: Adding or removing all images of one patient moves the sum by at most 1 in L2, whatever
          `look` gives: longer vectors are shortened, and one that is not finite counts as zero.
        - duplicates: Duplicating all images of a patient changes nothing (beyond rounding).
    """
    if len(labels) and not (labels.min() >= 0 and labels.max() < number_of_classes):
        raise IntakeError(
            f"Expected labels from 0 to {number_of_classes - 1}, got others. Check the classes of the configuration."
        )
    _, patient_of_image, images_of_patient = np.unique(patients, return_inverse=True, return_counts=True)
    weights = torch.from_numpy(1.0 / images_of_patient[patient_of_image])
    classes = torch.from_numpy(labels.astype(np.int64))
    total = torch.zeros(number_of_classes, look.dim, dtype=torch.float64)
    with torch.no_grad():
        rows = rows_alike(look, images.shape[1:])
        for start in range(0, len(images), rows):
            chunk = slice(start, start + rows)
            count = len(classes[chunk])
            # Always as many rows: how many others there are must not change how one image's numbers are rounded.
            pixels = torch.zeros(rows, *images.shape[1:])
            pixels[:count] = torch.from_numpy(images[chunk].astype(np.float32)) / 127.5 - 1
            padded = torch.zeros(rows, dtype=torch.int64)
            padded[:count] = classes[chunk]
            vectors = _bounded(look.vectors(pixels, padded)[:count].double())
            total.index_add_(0, classes[chunk], vectors * weights[chunk, None])
    return total


def rows_alike(look: Look, shape: Sequence[int]) -> int:
    """Return how many images may pass together: `_CHUNK`, if equal ones get equal bits at every place, else one.

    A patient who joins moves others to other places. A lens can be made to magnify the last bit of a number to the
    whole length of a vector, so a difference of one bit between places would let one patient change what others add. It
    is tried with numbers of our own (`Look.trial`), for a lens can also be made to hide the difference from a trial.

    Args:
        look: What images pass through.
        shape: Of an image: channels, then its sides in pixels.
    """
    rng = torch.Generator().manual_seed(0)
    labels = torch.zeros(_CHUNK, dtype=torch.int64)
    for _ in range(_DRAWS):
        image = torch.rand(1, *shape, generator=rng) * 2 - 1
        vectors = look.trial(image.expand(_CHUNK, *shape).contiguous(), labels)
        if not torch.equal(vectors.nan_to_num(), vectors[:1].nan_to_num().expand_as(vectors)):
            return 1
    return _CHUNK


def _bounded(rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms.isfinite(), rows / norms.clamp(min=1), 0.0)
