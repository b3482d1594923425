from pathlib import Path

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from client.intake import Dataset, Record, Scan
from common.errors import IntakeError


def make(patients: tuple[int, ...] = (0, 0, 1), channels: int = 1) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (len(patients), channels, 8, 8), dtype=np.uint8)
    return Dataset(images, np.arange(len(patients)), np.array(patients))


def test_repr_shows_nothing() -> None:
    record = Record(Path("folder/secret.dcm"), 3, ("issuer", "secret"), "sick", "north")
    assert repr(make()) == "Dataset()"
    assert repr(record) == "Record()"
    assert repr(Scan((record,), {"no label": 4})) == "Scan()"


@pytest.mark.parametrize("patients", [(1, 1), (0, 2), (1, 0), (0, 1, 0), (-1, 0)])
def test_patients_must_be_numbered_in_order(patients: tuple[int, ...]) -> None:
    with pytest.raises(IntakeError, match="patient numbers"):
        make(patients)


def test_forms_that_are_refused() -> None:
    images, numbers = np.zeros((2, 1, 8, 8), dtype=np.uint8), np.zeros(2, dtype=np.int64)
    for arrays in (
        (images[:, 0], numbers, numbers),
        (images[:, :, :4], numbers, numbers),
        (images.repeat(2, axis=1), numbers, numbers),
        (images, numbers[:1], numbers),
        (images, numbers, numbers[:1]),
        (images[:0], numbers[:0], numbers[:0]),
        (images.astype(np.float32), numbers, numbers),
        (images, numbers.astype(np.int32), numbers),
        (images, numbers - 1, numbers),
    ):
        with pytest.raises((IntakeError, TypeCheckError)):  # the latter when shapes are checked at run time
            Dataset(*arrays)
