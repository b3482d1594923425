import gzip
import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from client.intake import IntakeRules, Reason, Refused, scan
from client.intake import volumes as module
from client.intake.volumes import Volume
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
