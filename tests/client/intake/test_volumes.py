import gzip
import io
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from client.intake import IntakeRules, Reason, Refused, records, scan
from client.intake import volumes as module
from client.intake.records import Record
from client.intake.refusals import quiet
from client.intake.volumes import Volume
from client.intake.worker import decode
from common.errors import IntakeError
from tests.client.intake.pictures import read

WHOLE = IntakeRules(percentiles=(0, 100), frames="all")
BODY = np.random.default_rng(0).integers(-1000, 1000, (20, 16, 6)).astype(np.int16)
"""In RAS+: to the right, to the front, to the head."""


def nifti(path: Path, data: np.ndarray = BODY, affine: np.ndarray | None = None, kind: type = nib.Nifti1Image) -> Path:
    image = kind(data, np.eye(4) if affine is None else affine)
    image.to_filename(path)
    return path


def volume_of(path: Path, rules: IntakeRules = WHOLE) -> Volume:
    return Volume(io.BytesIO(path.read_bytes()), rules)


def expected(number: int) -> np.ndarray:
    """The patient's right at the left, the front above."""
    slice_ = BODY[::-1, ::-1, number].T.astype(float)
    return (slice_ - slice_.min()) / np.ptp(slice_) * 255


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_slices_are_axial(tmp_path: Path, name: str, kind: type) -> None:
    for target in ("RAS", "LPS", "PIR", "SLA"):
        image = nib.Nifti1Image(BODY, np.eye(4))
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(target))
        turned = image.as_reoriented(turn)
        path = nifti(tmp_path / name, np.asarray(turned.dataobj), turned.affine, kind)
        volume = volume_of(path)
        assert volume.slices == 6
        for number in (0, 5):
            assert np.allclose(volume.levels(number), expected(number), atol=1e-3)


def test_index_of_volumes(tmp_path: Path) -> None:
    nifti(tmp_path / "one.nii.gz")
    nifti(tmp_path / "two.nii")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "three.tiff")
    (tmp_path / "index.csv").write_text("file,patient,label\none.nii.gz,p1,x\ntwo.nii,p2,x\nthree.tiff,p3,x\n")
    assert [record.frame for record in scan(tmp_path).records] == [3, 3, None]
    found = scan(tmp_path, rules=WHOLE)
    assert [record.frame for record in found.records] == [*range(6), *range(6), None]
    dataset, refused = read(found, ["x"], 28, rules=WHOLE)
    assert (len(dataset.images), dataset.number_of_patients, dict(refused)) == (13, 3, {})
    assert np.array_equal(dataset.images[:6], dataset.images[6:12])


def test_scaling_and_floats(tmp_path: Path) -> None:
    image = nib.Nifti1Image(BODY.astype(np.float32) * 2.5 + 3, np.eye(4))
    image.to_filename(tmp_path / "a.nii")
    assert np.allclose(volume_of(tmp_path / "a.nii").levels(2), expected(2), atol=1e-2)
    scaled = nib.Nifti1Image(BODY, np.eye(4))
    scaled.header.set_slope_inter(2.0, -7.0)
    scaled.to_filename(tmp_path / "b.nii")
    assert np.allclose(volume_of(tmp_path / "b.nii").levels(2), expected(2), atol=1e-3)


def test_volume_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nifti(tmp_path / "a.nii")
    whole = path.read_bytes()
    with pytest.raises(Refused, match=Reason.TOO_MANY_FRAMES):
        volume_of(path, IntakeRules(max_frames=5))
    path.write_bytes(whole[:-9])
    with pytest.raises(Refused, match=Reason.PIXELS):
        volume_of(path).levels(0)
    bomb = tmp_path / "b.nii.gz"
    bomb.write_bytes(gzip.compress(whole + bytes(2**24)))
    assert volume_of(bomb).slices == 6
    monkeypatch.setattr(module, "MAX_VOLUME_BYTES", 1000)
    with pytest.raises(Refused, match=Reason.TOO_LARGE):
        volume_of(bomb)


@pytest.mark.parametrize(
    "data", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2, 3), np.uint8), np.zeros((2, 2, 2), "c8")]
)
def test_what_is_no_volume_of_real_numbers_is_refused(tmp_path: Path, data: np.ndarray) -> None:
    with pytest.raises(Refused, match="header"):
        volume_of(nifti(tmp_path / "a.nii", data))


def test_mutated_headers_are_refused_or_read(tmp_path: Path) -> None:
    whole = nifti(tmp_path / "a.nii").read_bytes()
    rng = np.random.default_rng(1)
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, 352, 4):
            data[place] = rng.integers(0, 256)
        (tmp_path / "b.nii").write_bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.2 else data)
        try:
            outcomes.add(volume_of(tmp_path / "b.nii").levels(0).dtype)
        except Refused as refusal:
            outcomes.add(refusal.reason)
    assert len(outcomes) > 2


def indexed(folder: Path, *names: str) -> Path:
    rows = [f"{name},p{number},x\n" for number, name in enumerate(names)]
    (folder / "index.csv").write_text("".join(["file,patient,label\n", *rows]))
    return folder


def test_slices_are_there(tmp_path: Path) -> None:
    """A header alone would make thousands of records."""
    whole = nifti(tmp_path / "good.nii", np.zeros((8, 8, 4000), np.uint8)).read_bytes()
    (tmp_path / "short.nii").write_bytes(whole[:-1])
    (tmp_path / "good.nii.gz").write_bytes(gzip.compress(whole))
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(whole[:352]))
    found = scan(indexed(tmp_path, "good.nii", "short.nii", "good.nii.gz", "short.nii.gz"), rules=WHOLE)
    assert {record.path.name for record in found.records} == {"good.nii", "good.nii.gz"}
    assert len(found.records) == 8000
    assert [(refusal.line, refusal.reason) for refusal in found.refusals] == [(3, Reason.PIXELS), (5, Reason.PIXELS)]


def test_the_slices_of_a_source_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where many rows of the index name one file."""
    nifti(tmp_path / "a.nii")
    monkeypatch.setattr(records, "MAX_FRAMES", 13)
    found = scan(indexed(tmp_path, "a.nii", "a.nii", "a.nii"), rules=WHOLE)
    assert len(found.records) == 12
    assert [(refusal.line, refusal.reason) for refusal in found.refusals] == [(4, Reason.SOURCE_FRAMES)]


ODD = {"magic": (344, b"n+SE"), "dim": (70, b"SE"), "qform": (252, b"SE"), "vox": (108, b"SECR"), "size": (0, b"SECR")}
"""Places of the header, and what stands there: 17747 as a number of 16 bits."""


def odd(folder: Path) -> Path:
    whole = nifti(folder / "good.nii").read_bytes()
    for name, (place, value) in ODD.items():
        (folder / f"{name}.nii").write_bytes(whole[:place] + value + whole[place + len(value) :])
    return indexed(folder, "good.nii", *(f"{name}.nii" for name in ODD))


def test_nothing_of_a_volume_is_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """nibabel logs odd values of a header, to stderr too."""
    folder = odd(tmp_path)
    with caplog.at_level(logging.DEBUG):
        found = scan(folder, rules=WHOLE)
        assert {record.path.name for record in found.records} >= {"good.nii"}
        assert Reason.HEADER in found.refused
        decoded = [decode_outcome(record) for record in found.records]
        with quiet():
            outcomes = [scanned_here(folder / f"{name}.nii") for name in ODD]
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert any(outcomes)
    assert any(decoded)
    with caplog.at_level(logging.DEBUG):
        scanned_here(folder / "dim.nii")
    assert "17747" in caplog.text  # so it would


def decode_outcome(record: Record) -> bool:
    try:
        return decode(record, WHOLE).size > 0
    except Refused:
        return False


def scanned_here(path: Path) -> str:
    try:
        volume_of(path)
    except Refused as refusal:
        return refusal.reason
    return ""


def test_no_volume_is_opened_in_the_importing_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nifti(tmp_path / "a.nii.gz")
    monkeypatch.delattr(Volume, "__init__")
    assert len(scan(indexed(tmp_path, "a.nii.gz"), rules=WHOLE).records) == 6


def test_a_gzip_header_without_an_end_costs_its_file(tmp_path: Path) -> None:
    """gzip looks for the end of the name byte by byte."""
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8b\x08\x08" + bytes(6) + b"A" * 2**25)
    with pytest.raises(IntakeError, match=Reason.TOO_SLOW):
        scan(indexed(tmp_path, "a.nii.gz"), rules=IntakeRules(decode_seconds=0.5))
