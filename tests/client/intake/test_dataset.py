import stat
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from jaxtyping import TypeCheckError

from client.intake import Dataset, Record, Scan, load, save
from common.errors import IntakeError, StorageError


def make(patients: tuple[int, ...] = (0, 0, 1)) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (len(patients), 1, 8, 8), dtype=np.uint8)
    return Dataset(images, np.arange(len(patients)), np.array(patients))


def test_save_and_load(tmp_path: Path) -> None:
    dataset = make()
    save(dataset, tmp_path / "images.safetensors")
    again = load(tmp_path / "images.safetensors")
    for name in ("images", "labels", "patients"):
        assert np.array_equal(getattr(dataset, name), getattr(again, name))
    assert again.number_of_patients == 2
    assert stat.S_IMODE((tmp_path / "images.safetensors").stat().st_mode) == 0o600


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
        (images, numbers[:1], numbers),
        (images, numbers, numbers[:1]),
        (images[:0], numbers[:0], numbers[:0]),
        (images.astype(np.float32), numbers, numbers),
        (images, numbers.astype(np.int32), numbers),
        (images, numbers - 1, numbers),
    ):
        with pytest.raises((IntakeError, TypeCheckError)):  # the latter when shapes are checked at run time
            Dataset(*arrays)


def test_load_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "images.safetensors"
    with pytest.raises(StorageError):
        load(path)
    save(make(), path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole + b"x", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(StorageError):
            load(path)
    arrays = safetensors.numpy.load(whole)
    path.write_bytes(safetensors.numpy.save(arrays | {"more": np.zeros(1)}))
    with pytest.raises(StorageError):
        load(path)
    path.write_bytes(safetensors.numpy.save(arrays | {"patients": np.array([0, 2, 1])}))
    with pytest.raises(IntakeError):
        load(path)
