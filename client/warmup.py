"""The bounded sums of the warm-up: one vector per patient, added up by class. Out of scope: noise (client/dp)."""

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from common.errors import IntakeError
from common.features import FeatureMap, feature_dim, features

_CHUNK = 256


def embedding_sum(
    images: UInt8[np.ndarray, "images channels size size"],
    labels: Int[np.ndarray, "images"],
    patients: Shaped[np.ndarray, "images"],
    number_of_classes: int,
    fm: FeatureMap,
) -> Float[Tensor, "classes dim"]:
    """Add up every patient's mean of onehot(class) x features. Private until noise is added.

    Args:
        images: Pixels, 0 to 255, as many channels as the map is for.
        labels: Class number of each image, below `number_of_classes`.
        patients: What tells the patients apart, of any sortable type.
        number_of_classes: Rows of the sum.
        fm: The public feature map.

    Returns:
        The sum in double precision; column 0 holds `CONSTANT` times the patients of the class.

    Raises:
        IntakeError: A label is not a class number.

    Guarantees:
        - one_patient_one_unit: Adding or removing all images of one patient moves the sum by at most 1 in L2.
        - duplicates: Duplicating all images of a patient changes nothing (beyond rounding).
    """
    if len(labels) and not (labels.min() >= 0 and labels.max() < number_of_classes):
        raise IntakeError(
            f"Expected labels from 0 to {number_of_classes - 1}, got others. Check the classes of the configuration."
        )
    _, patient_of_image, images_of_patient = np.unique(patients, return_inverse=True, return_counts=True)
    weights = torch.from_numpy(1.0 / images_of_patient[patient_of_image])
    classes = torch.from_numpy(labels.astype(np.int64))
    total = torch.zeros(number_of_classes, feature_dim(fm), dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(images), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            pixels = torch.from_numpy(images[chunk].astype(np.float32)) / 127.5 - 1
            vectors = features(fm, pixels).double()
            # The map promises this bound; the party that answers for it does not take it on trust.
            vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1)
            total.index_add_(0, classes[chunk], vectors * weights[chunk, None])
    return total
