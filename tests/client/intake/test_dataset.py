import stat
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from jaxtyping import TypeCheckError

from client.intake import Dataset, Form, Record, Scan, load, read_form, save
from common.errors import IntakeError, StorageError

CLASSES = ("clear", "nodule", "mass")


def make(patients: tuple[int, ...] = (0, 0, 1), channels: int = 1) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (len(patients), channels, 8, 8), dtype=np.uint8)
    return Dataset(images, np.arange(len(patients)), np.array(patients))


def test_save_and_load(tmp_path: Path) -> None:
    dataset = make()
    save(dataset, tmp_path / "images.safetensors", CLASSES)
    again = load(tmp_path / "images.safetensors")
    for name in ("images", "labels", "patients"):
        assert np.array_equal(getattr(dataset, name), getattr(again, name))
    assert again.number_of_patients == 2
    assert stat.S_IMODE((tmp_path / "images.safetensors").stat().st_mode) == 0o600


@pytest.mark.parametrize("channels", [1, 3])
def test_the_form_is_read_without_the_images(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "images.safetensors"
    save(make(channels=channels), path, CLASSES)
    assert read_form(path) == Form(CLASSES, 8, channels)
    assert load(path).images.shape == (3, channels, 8, 8)
    arrays = safetensors.numpy.load(path.read_bytes())
    path.write_bytes(safetensors.numpy.save(arrays))  # as an earlier release wrote it
    assert read_form(path) == Form(None, 8, channels)
    assert len(load(path).images) == 3


def test_the_form_of_a_damaged_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "images.safetensors"
    assert read_form(path) is None
    images = np.zeros((1, 7, 8, 8), np.uint8)
    other = safetensors.numpy.save({"pictures": images})
    for content in (b"", b"\xff" * 64, other, safetensors.numpy.save({"images": images}, {"classes": "["})):
        path.write_bytes(content)
        assert read_form(path) is None
    path.write_bytes(safetensors.numpy.save({"images": images}))
    assert read_form(path) is None


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


def test_load_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "images.safetensors"
    with pytest.raises(StorageError):
        load(path)
    save(make(), path, CLASSES)
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
