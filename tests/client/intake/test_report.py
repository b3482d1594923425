"""How files and what stands in them are named, and what is counted."""

import io
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from client.intake import IntakeRules
from client.intake.selection import Practice
from client.intake.sizes import size_of
from client.intake.survey import survey
from tests.client.intake.conftest import WriteDicom


def examples(source: Path, show_files: bool = False) -> dict[str, tuple[str, ...]]:
    practice = Practice(source, "none", IntakeRules(workers=1))
    return {group.said: group.examples for group in survey(practice, show_files=show_files).report.refused}


def shown(source: Path, **rules: object) -> list[str]:
    """Return the names below the usable pictures."""
    found = survey(Practice(source, "none", IntakeRules.model_validate({"workers": 1, **rules})))
    return [name for name, _ in found.rows[0].pictures]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Three good rows, and from line 5 rows of files that are not there, lead out, or have no patient."""
    for name in "abc":
        Image.fromarray(np.random.default_rng(ord(name)).integers(0, 255, (16, 16), np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    rows = ["a.png,P1", "b.png,P2", "c.png,P3", *(f"gone{number}.png,P{number}" for number in range(4, 8))]
    rows += ["../out.png,P9", "a.png,"]
    (tmp_path / "index.csv").write_text("\n".join(["file,patient", *rows]))
    return tmp_path


def test_told_apart(index: Path, tmp_path: Path, write_dicom: WriteDicom) -> None:
    assert shown(index) == ["line 2", "line 3", "line 4"]
    stack = np.random.default_rng(0).integers(0, 255, (3, 16, 16), np.uint8)
    np.savez(tmp_path / "a.npz", images=stack, patient_id=["a", "b", "c"])
    assert shown(tmp_path / "a.npz") == ["row 0", "row 1", "row 2"]
    (tmp_path / "z").mkdir()
    with zipfile.ZipFile(tmp_path / "z" / "all.zip", "w") as archive:
        for name in "abc":
            file = write_dicom(tmp_path / "one", SOPInstanceUID=f"1.{ord(name)}")
            archive.write(file, f"NAME_{name}")
    assert shown(tmp_path / "z") == ["no. 1 member 1", "no. 1 member 2", "no. 1 member 3"]
    many = np.random.default_rng(0).integers(0, 4096, (3, 16, 16)).astype(np.uint16)
    first = {"Rows": 16, "Columns": 16, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
    write_dicom(tmp_path / "m" / "one", many[0], **first, NumberOfFrames=3, PixelData=many.tobytes())
    assert shown(tmp_path / "m", frames="all") == ["no. 1 frame 1", "no. 1 frame 2", "no. 1 frame 3"]


def test_rows_that_are_refused_can_be_found(index: Path) -> None:
    assert examples(index) == {
        "file missing": ("line 5", "line 6", "line 7"),
        "no patient id": ("line 10",),
        "path leads out of the folder": ("line 9",),
    }
    named = examples(index, show_files=True)
    assert named["file missing"] == ("gone4.png line 5", "gone5.png line 6", "gone6.png line 7")
    assert named["path leads out of the folder"] == ("line 9",)


def test_rows_of_an_npz_without_a_patient_can_be_found(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 255, (9, 16, 16), np.uint8)
    np.savez(tmp_path / "a.npz", images=stack, patient_id=["a", *[""] * 6, "b", "c"])
    found = survey(Practice(tmp_path / "a.npz", "none", IntakeRules(workers=1))).report
    assert [(one.count, one.examples) for one in found.refused] == [(6, ("row 1", "row 2", "row 3"))]


def test_sizes_are_those_that_files_state(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30), np.uint8))
    for name in ("a.png", "b.jpg", "c.tif"):
        picture.save(tmp_path / name)
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((11, 12, 3)), np.eye(4)), tmp_path / "d.nii.gz")
    rows = [f"{path.name},P{number}" for number, path in enumerate(sorted(tmp_path.iterdir()))]
    (tmp_path / "index.csv").write_text("\n".join(["file,patient", *rows]))
    found = survey(Practice(tmp_path, "none", IntakeRules(workers=1))).report
    assert found.kinds == {"sizes": {"30 x 20": 3, "11 x 12": 1}}
    stack = np.random.default_rng(0).integers(0, 255, (3, 1, 16, 18), np.uint8)
    np.savez(tmp_path / "a.npz", images=stack, patient_id=["a", "b", "c"])
    assert survey(Practice(tmp_path / "a.npz", "none", IntakeRules(workers=1))).report.kinds["sizes"] == {"18 x 16": 3}


def test_a_size_is_looked_for_within_bounds() -> None:
    jpeg = b"\xff\xd8" + b"\xff\xe0\0\2" * 999
    for data in (b"", b"\x89PNG", jpeg, b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"):
        assert size_of(io.BytesIO(data)) is None


def test_pictures_of_each_reason_with_the_reason(tmp_path: Path, write_dicom: WriteDicom) -> None:
    for number in range(60):
        kind = {"Modality": "US"} if number < 50 else {"BurnedInAnnotation": "YES"} if number < 59 else {}
        pixels = np.random.default_rng(number).integers(0, 4096, (16, 16)).astype(np.uint16)
        write_dicom(tmp_path / f"{number:02d}", pixels, SOPInstanceUID=f"1.2.{number}", **kind)
    rows = {row.title: len(row.pictures) for row in survey(Practice(tmp_path, "none", IntakeRules(workers=1))).rows}
    assert rows == {
        "usable, drawn at random": 1,
        "not used: ultrasound": 8,
        "not used: text burned in, says the header": 8,
    }


def test_labels_that_are_values_of_headers_stay_on_the_terminal(tmp_path: Path, write_dicom: WriteDicom) -> None:
    for number in range(3):
        write_dicom(tmp_path / str(number), SOPInstanceUID=f"1.{number}", StudyDescription=f"of {number % 2}")
    practice = Practice(tmp_path, "tag:StudyDescription", IntakeRules(workers=1))
    assert survey(practice).report.classes is None
    assert survey(practice).labels == {"of 0": 2, "of 1": 1}
    assert survey(practice, ["of 1", "none"]).report.classes == {"of 1": 1, "none": 0}
    (tmp_path / "rules.toml").write_text('[[label]]\nclass = "a"\ntag = "StudyDescription"\nmatches = "1"\n')
    by_rule = Practice(tmp_path, f"rules:{tmp_path / 'rules.toml'}", IntakeRules(workers=1))
    assert survey(by_rule).report.classes == {"a": 1}
