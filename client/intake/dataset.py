"""The images a site trains on, in memory and in one file. Out of scope: where they come from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import numpy as np
import safetensors.numpy
from jaxtyping import Int64, UInt8
from safetensors import SafetensorError, safe_open

from common.config import IMAGE_CHANNELS
from common.errors import IntakeError, StorageError
from common.files import write_atomic

_NAMES = {"images", "labels", "patients"}


@final
@dataclass(frozen=True)
class Form:
    """What the images of a data set are, and none of its content.

    Attributes:
        classes: Their names in the order of their numbers; None where the file was written before it said so.
        size: Side of an image in pixels.
        channels: 1 for grey, 3 for colour.
    """

    classes: tuple[str, ...] | None
    size: int
    channels: int


@final
@dataclass(frozen=True, eq=False)
class Dataset:
    """Images, their classes and their patients. Its repr shows neither content nor counts.

    Attributes:
        images: Levels from 0, black, to 255: one channel of grey, or red, green and blue.
        labels: Class numbers, from 0.
        patients: Patient numbers 0..P-1 without a gap, sorted: one patient's images are adjacent.

    Raises:
        IntakeError: Types, shapes or numbers are not as above, or there is no image.
    """

    images: UInt8[np.ndarray, "images channels size size"] = field(repr=False)
    labels: Int64[np.ndarray, "images"] = field(repr=False)
    patients: Int64[np.ndarray, "images"] = field(repr=False)

    def __post_init__(self) -> None:
        """Check what every reader relies on."""
        _check_form(self)
        steps = np.diff(self.patients, prepend=np.int64(-1))
        if steps[0] != 1 or np.any((steps[1:] != 0) & (steps[1:] != 1)):
            raise IntakeError("Expected patient numbers 0, 1, 2, ... in order and without a gap. Run the intake again.")
        if self.labels.min() < 0:
            raise IntakeError("Expected class numbers from 0. Run the intake again.")

    @property
    def number_of_patients(self) -> int:
        """Return how many patients there are; exact, so it never leaves the site."""
        return int(self.patients[-1]) + 1


def save(dataset: Dataset, path: Path, classes: Sequence[str]) -> None:
    """Write a data set to one file that only its owner can read.

    Args:
        dataset: What the intake read.
        path: The file.
        classes: Their names in the order of their numbers, for `read_form`.

    Raises:
        StorageError: The file cannot be written; an old one stays whole.
    """
    arrays = {name: np.ascontiguousarray(getattr(dataset, name)) for name in sorted(_NAMES)}
    write_atomic(path, safetensors.numpy.save(arrays, {"classes": json.dumps(list(classes))}), mode=0o600)


def read_form(path: Path) -> Form | None:
    """Read what the images of a file are, without them; None where it is damaged or gone."""
    try:
        with safe_open(path, framework="numpy") as file:
            named = (file.metadata() or {}).get("classes")
            _, channels, size, _ = file.get_slice("images").get_shape()
        classes = None if named is None else tuple(map(str, json.loads(named)))
        return Form(classes, size, channels) if channels in IMAGE_CHANNELS else None
    except (SafetensorError, OSError, ValueError, TypeError):
        return None


def load(path: Path) -> Dataset:
    """Read a data set that `save` wrote, strictly.

    Raises:
        StorageError: The file cannot be read or is not of this form.
        IntakeError: The arrays in it do not make a data set.
    """
    try:
        arrays = safetensors.numpy.load(path.read_bytes())
    except OSError as error:
        raise StorageError(f"Could not read {path.name}: {error.strerror}. Run the intake again.") from error
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        # The last four: tensors of a type that NumPy does not have.
        raise StorageError(f"{path.name} is damaged or not a data set. Delete it and run the intake again.") from error
    if set(arrays) != _NAMES:
        raise StorageError(f"{path.name} is not a data set: it holds other arrays. Run the intake again.")
    return Dataset(**arrays)


def _check_form(dataset: Dataset) -> None:
    images, labels, patients = dataset.images, dataset.labels, dataset.patients
    if (images.dtype, labels.dtype, patients.dtype) != (np.uint8, np.int64, np.int64):
        raise IntakeError("Expected images of uint8, labels and patients of int64. Run the intake again.")
    square = images.ndim == 4 and images.shape[1] in IMAGE_CHANNELS and images.shape[2] == images.shape[3]
    if not square or labels.shape != images.shape[:1] or patients.shape != images.shape[:1] or images.size == 0:
        raise IntakeError(
            "Expected images x 1 or 3 channels x size x size with one label and one patient each, and at least one."
        )
