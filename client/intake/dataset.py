"""The images a site trains on. Out of scope: where they come from, how they are stored (client/intake/vault)."""

from dataclasses import dataclass, field
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt8

from common.config import IMAGE_CHANNELS
from common.errors import IntakeError


@runtime_checkable
class Pixels(Protocol):
    """Images x channels x size x size of uint8: an array, or one that is decrypted where it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Images, channels, and the side twice."""
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, rows: Any, /) -> UInt8[np.ndarray, "..."]:
        """Return some images, by a slice or an array of their numbers."""
        ...


@final
@dataclass(frozen=True)
class Form:
    """What the images of a data set are, and none of its content.

    Attributes:
        classes: Their names in the order of their numbers.
        size: Side of an image in pixels.
        channels: 1 for grey, 3 for colour.
    """

    classes: tuple[str, ...]
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

    images: Pixels = field(repr=False)
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


def _check_form(dataset: Dataset) -> None:
    images, labels, patients = dataset.images, dataset.labels, dataset.patients
    kind = images.dtype if isinstance(images, np.ndarray) else np.dtype(np.uint8)
    if (kind, labels.dtype, patients.dtype) != (np.uint8, np.int64, np.int64):
        raise IntakeError("Expected images of uint8, labels and patients of int64. Run the intake again.")
    shape = images.shape
    square = len(shape) == 4 and shape[1] in IMAGE_CHANNELS and shape[2] == shape[3]
    if not square or labels.shape != shape[:1] or patients.shape != shape[:1] or 0 in shape:
        raise IntakeError(
            "Expected images x 1 or 3 channels x size x size with one label and one patient each, and at least one."
        )
