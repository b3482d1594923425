import io
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.intake import Reason, archives, scan
from client.intake.arrays import MAX_DECODED_BYTES
from common.errors import ConfigError, IntakeError
from tests.client.intake.pictures import read

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
RAMP = np.linspace(0, 255, 32 * 32).reshape(32, 32).round().astype(np.uint8)


def write(folder: Path, **arrays: Any) -> Path:
    path = folder / "images.npz"
    np.savez(path, **arrays)
    return path


def stack(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32), dtype=np.uint8)


def test_grouped_by_issuer_and_id(tmp_path: Path) -> None:
    images = stack()
    path = write(
        tmp_path,
        images=images,
        labels=np.array([1, 0, 1, 0]),
        patient_id=np.array(["b", "a", "b", "a"]),
        issuer=np.array(["x", "x", "x", "y"]),
        site=np.array(["north", "", "north", "south"]),
    )
    found = scan(path)
    assert [record.site for record in found.records] == ["north", None, "north", "south"]
    dataset, refused = read(found, ["0", "1"], 32)
    assert dataset.patients.tolist() == [0, 1, 1, 2]
    assert dataset.labels.tolist() == [0, 1, 1, 0]
    assert np.array_equal(dataset.images[:, 0], images[[1, 0, 2, 3]])
    assert not refused


@pytest.mark.parametrize("form", ["NHW", "NHW1", "N1HW", "NHW3"])
def test_shapes(tmp_path: Path, form: str) -> None:
    images = {
        "NHW": RAMP[None],
        "NHW1": RAMP[None, :, :, None],
        "N1HW": RAMP[None, None],
        "NHW3": np.repeat(RAMP[None, :, :, None], 3, axis=3),
    }[form]
    dataset, _ = read(scan(write(tmp_path, images=images, patient_id=np.array([7])), "none"), ["all"], 32)
    assert np.array_equal(dataset.images[0, 0], RAMP)


@pytest.mark.parametrize("scale", [1, 255, 16])
def test_colours(tmp_path: Path, scale: int) -> None:
    """uint8 as it is, floats up to 1, and uint16 stretched with its three colours together."""
    colour = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=2)
    images = {1: colour, 255: colour / 255, 16: colour.astype(np.uint16) * 16}[scale][None]
    found = scan(write(tmp_path, images=images, patient_id=np.array([7])), "none")
    dataset, _ = read(found, ["all"], 32, 3)
    assert np.abs(dataset.images[0].astype(int) - np.moveaxis(colour, 2, 0)).max() <= (0 if scale == 1 else 1)
    grey, _ = read(found, ["all"], 32)
    assert np.abs(grey.images[0, 0] - colour @ [0.299, 0.587, 0.114]).max() <= 1.01


def test_grey_arrays_in_colour_have_equal_channels(tmp_path: Path) -> None:
    found = scan(write(tmp_path, images=RAMP[None], patient_id=np.array([7])), "none")
    dataset, _ = read(found, ["all"], 32, 3)
    assert np.array_equal(dataset.images, np.repeat(RAMP[None, None], 3, axis=1))


@pytest.mark.parametrize(
    "images",
    [
        RAMP.astype(np.uint16) * 16,
        RAMP / 255,
        RAMP / 127.5 - 1,
        RAMP.astype(np.float16),
        (RAMP / np.float32(255)).astype(">f4"),
        RAMP.astype(">u2"),
    ],
)
def test_values_become_grey_levels(tmp_path: Path, images: np.ndarray) -> None:
    dataset, _ = read(scan(write(tmp_path, images=images[None], patient_id=np.array([7])), "none"), ["all"], 32)
    assert np.abs(dataset.images[0, 0].astype(int) - RAMP).max() <= 1


def test_bad_pixels_refuse_their_image_only(tmp_path: Path) -> None:
    images = np.repeat(RAMP[None] / 255, 5, axis=0)
    images[0, 0, 0], images[1, 0, 0], images[2, 0, 0], images[3, 0, 0] = np.nan, np.inf, 300, -2
    dataset, refused = read(scan(write(tmp_path, images=images, patient_id=np.arange(5)), "none"), ["all"], 32)
    assert len(dataset.images) == 1
    assert refused == {Reason.NOT_FINITE: 2, Reason.OUT_OF_RANGE: 2}


def test_labels(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        images=stack(),
        patient_id=np.arange(4),
        labels=np.array([0.0, 1.0, np.nan, 2.0]),
        kind=np.array([[b"a"], [b"b"], [b""], [b" a "]]),
        sick=np.array([True, False, True, True]),
    )
    assert [record.label for record in scan(path).records] == ["0", "1", None, "2"]
    assert [record.label for record in scan(path, "column:kind").records] == ["a", "b", None, "a"]
    assert [record.label for record in scan(path, "column:sick").records] == ["1", "0", "1", "1"]
    assert {record.label for record in scan(path, "none").records} == {"all"}
    _, refused = read(scan(path), ["0"], 28)
    assert refused == {Reason.NO_LABEL: 1, Reason.OTHER_LABEL: 2}
    with pytest.raises(ConfigError, match="column:NAME"):
        scan(path, "tag:Modality")
    with pytest.raises(IntakeError, match="--label none"):
        scan(path, "column:nothing")


def test_mnist_form_has_one_patient_an_image(tmp_path: Path) -> None:
    path = write(tmp_path, x_train=stack(), y_train=np.array([3, 1, 4, 1]), x_test=stack(2), y_test=np.array([5, 9]))
    dataset, _ = read(scan(path), ["1", "3", "4"], 32)
    assert dataset.number_of_patients == 4


def test_missing_patients_are_explained(tmp_path: Path) -> None:
    with pytest.raises(IntakeError, match="add an array patient_id"):
        scan(write(tmp_path, images=stack(), labels=np.arange(4)))
    with pytest.raises(IntakeError, match="No image names its patient"):
        scan(write(tmp_path, images=stack(), patient_id=np.array([""] * 4)), "none")
    found = scan(write(tmp_path, images=stack(), patient_id=np.array(["", "a", "b", "c"])), "none")
    assert found.refused == {Reason.NO_PATIENT: 1}
    with pytest.raises(IntakeError, match="text or integers"):
        scan(write(tmp_path, images=stack(), patient_id=np.arange(4) / 2), "none")


@pytest.mark.parametrize("name", ["labels", "patient_id", "issuer", "site"])
def test_lengths_must_agree(tmp_path: Path, name: str) -> None:
    arrays = {"labels": np.arange(4), "patient_id": np.arange(4)} | {name: np.arange(3)}
    with pytest.raises(IntakeError, match=name):
        scan(write(tmp_path, images=stack(), **arrays))


def test_form_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(IntakeError, match="neither `images`"):
        scan(write(tmp_path, pictures=stack()))
    with pytest.raises(IntakeError, match="shape"):
        scan(write(tmp_path, images=RAMP, patient_id=np.arange(32)), "none")
    with pytest.raises(IntakeError, match="int64"):
        scan(write(tmp_path, images=stack().astype(np.int64), patient_id=np.arange(4)), "none")
    with pytest.raises(IntakeError, match="object"):
        scan(write(tmp_path, images=stack(), patient_id=np.array([{}] * 4, dtype=object)), "none")


def test_a_header_that_claims_too_much_is_refused_before_allocation(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    for shape, match in (((2**40, 64, 64), "limit"), ((2**22 + 1, 1, 1), "images"), ((1, 9000, 9000), "limits")):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", header.getvalue())
        with pytest.raises(IntakeError, match=match):
            scan(path)
    assert MAX_DECODED_BYTES == 2 * 1024**3


def test_a_header_without_end_is_read_no_further_than_a_header_goes(tmp_path: Path) -> None:
    """From version 2 on, a header states its length in 32 bits."""
    with zipfile.ZipFile(tmp_path / "images.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x01" + b" " * 2**25)
    tracemalloc.start()
    try:
        with pytest.raises(IntakeError, match="damaged"):
            scan(tmp_path / "images.npz")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_that_inflate_without_bound_are_refused(tmp_path: Path, method: int) -> None:
    """Even one that is not an array of ours; numpy itself stores or deflates."""
    path = write(tmp_path, images=stack(), patient_id=np.arange(4))
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr("labels.npy", b"")
    with pytest.raises(IntakeError, match=r"deflate.*savez_compressed"):
        scan(path, "none")


def test_the_directory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, images=stack(), patient_id=np.arange(4))
    whole = path.read_bytes()
    path.write_bytes(whole[:-18] + b"PK\x05\x06" + whole[-14:])  # two ends, of which zipfile reads the first
    with pytest.raises(IntakeError, match="damaged"):
        scan(path, "none")
    path.write_bytes(whole)
    monkeypatch.setattr(archives, "MAX_DIRECTORY_BYTES", 10)
    with pytest.raises(IntakeError, match="expands"):
        scan(path, "none")


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_mutated_bytes_give_an_intake_error_or_a_count(data: st.DataObject) -> None:
    content = io.BytesIO()
    pack = data.draw(st.sampled_from([np.savez, np.savez_compressed]))
    pack(content, images=stack(3), labels=np.arange(3), patient_id=np.array(["a", "b", "c"]))
    mutated = bytearray(content.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    mutated = mutated[: data.draw(st.one_of(st.just(len(mutated)), st.integers(0, len(mutated))))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        path.write_bytes(mutated)
        try:
            dataset, refused = read(scan(path), ["0", "1", "2"], 28)
        except IntakeError:
            return
        assert len(dataset.images) + sum(refused.values()) == 3


@pytest.mark.skipif(not SHARED.exists(), reason="the shared test data are not on this machine")
def test_real_sets() -> None:
    expected = {"kermany_cxr/kermany64.npz": (2620, 1415), "nih_cxr14/nih64.npz": (582, 147)}
    for name, counts in expected.items():
        dataset, refused = read(scan(SHARED / name), ["0", "1"], 32)
        assert (len(dataset.images), dataset.number_of_patients) == counts
        assert not refused


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the shared test data are not on this machine")
def test_mnist() -> None:
    dataset, refused = read(scan(SHARED / "mnist" / "mnist.npz"), [str(digit) for digit in range(10)], 28)
    source = np.load(SHARED / "mnist" / "mnist.npz", allow_pickle=False)
    order = np.argsort([str(row) for row in range(60_000)])
    assert np.array_equal(dataset.images[:, 0], source["x_train"][order])
    assert np.array_equal(dataset.labels, source["y_train"][order])
    assert not refused


@pytest.mark.parametrize("name", ["images", "patient_id"])
def test_names_of_fields_are_not_shown(tmp_path: Path, name: str) -> None:
    """A type of several fields has their names, which are text of the file."""
    fields = np.zeros(2, [("DOE_JOHN_1950", "u1")])
    arrays = {"images": np.zeros((2, 8, 8), np.uint8), "patient_id": np.arange(2)} | {name: fields}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(IntakeError) as caught:
        scan(tmp_path / "a.npz", "none")
    assert "Expected" in str(caught.value)
    assert "DOE" not in str(caught.value)
