import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from client.intake import IntakeRules, Reason, Scan, decode_records, scan
from client.intake.isolation import DecoderPool
from client.intake.labels import TagLabel
from client.intake.requests import Asked, Form, Job, ask_directory, ask_header, ask_pixels, ask_volume

WriteDicom = Callable[..., Path]
RULES = IntakeRules(workers=1)


def outcomes(found: Scan) -> list[str]:
    return [one if isinstance(one, str) else "read" for _, one in decode_records(found.records, 28, rules=RULES)]


def swap(path: Path, other: Path) -> None:
    """Put another file in a file's place, of the same size and with the same time of change."""
    about = path.stat()
    assert other.stat().st_size == about.st_size
    os.utime(other, ns=(about.st_atime_ns, about.st_mtime_ns))
    other.replace(path)


def picture(path: Path, kind: str, level: int) -> Path:
    pixels = np.full((8, 8), level, np.uint8)
    if kind == "nii":
        nib.Nifti1Image(np.repeat(pixels[..., None], 3, 2), np.eye(4)).to_filename(path)
    elif kind == "npz":
        np.savez(path, images=pixels[None], patient_id=np.array([f"P{level}"]))
    else:
        Image.fromarray(pixels).save(path, "TIFF" if kind == "tif" else "PNG")
    return path


@pytest.mark.parametrize("kind", ["dcm", "zip", "tif", "nii", "npz"])
def test_only_what_was_seen(tmp_path: Path, write_dicom: WriteDicom, kind: str) -> None:
    """A file that another one replaced between scan and decoding is refused, whatever its kind; the rest is read."""
    folder, outside = tmp_path / "source", tmp_path / f"other.{kind}"
    if kind == "dcm":
        write_dicom(folder / "a.dcm", PatientID="P1")
        write_dicom(folder / "b.dcm", PatientID="P2")
        write_dicom(outside, PatientID="P3")
    elif kind == "zip":
        folder.mkdir()
        for path, patient in ((folder / "a.zip", "P1"), (folder / "b.zip", "P2"), (outside, "P3")):
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(write_dicom(tmp_path / "one", PatientID=patient), "one")
    else:
        folder.mkdir()
        for path, level in ((folder / f"a.{kind}", 1), (folder / f"b.{kind}", 2), (outside, 3)):
            picture(path, kind, level)
        (folder / "index.csv").write_text(f"file,patient\na.{kind},1\nb.{kind},2\n")
    if kind == "npz":
        (folder / "b.npz").unlink()
        (folder / "index.csv").unlink()
    found = scan(folder, "none", RULES)
    swap(folder / f"a.{kind}", outside)
    assert outcomes(found) == [Reason.CHANGED, *["read"] * (len(found.records) - 1)]
    assert outcomes(scan(folder, "none", RULES)) == ["read"] * len(found.records)


@pytest.mark.parametrize(
    "tags", [{"PatientID": "P2"}, {"BurnedInAnnotation": "YES"}, {"Modality": "US"}, {"SOPInstanceUID": "1.3"}]
)
def test_another_header_is_refused_whatever_the_file_system_says(
    tmp_path: Path, write_dicom: WriteDicom, tags: dict[str, str]
) -> None:
    """The state of a file may lie, as on a share with coarse times: whose picture it is must agree too."""
    before = {"PatientID": "P1", "Modality": "CR", "BurnedInAnnotation": "NO", "SOPInstanceUID": "1.2"}
    path = write_dicom(tmp_path / "a", **before)
    found = scan(tmp_path, "none", RULES)
    assert outcomes(found) == ["read"]
    write_dicom(path, **(before | tags))
    (again,) = scan(tmp_path, "none", RULES).records
    (seen,) = found.records
    lying = replace(seen, seen=(again.seen[0], seen.seen[1]))
    assert outcomes(replace(found, records=(lying,))) == [Reason.CHANGED]


def test_a_record_without_what_was_seen_is_not_decoded(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "a")
    found = scan(tmp_path, "none", RULES)
    assert outcomes(replace(found, records=(replace(found.records[0], seen=("", "")),))) == [Reason.CHANGED]


ASKED: dict[str, Callable[[Path], Asked[Any]]] = {
    "header": lambda path: ask_header(path, None, TagLabel(tag=""), RULES),
    "member": lambda path: ask_header(path, "a", TagLabel(tag=""), RULES),
    "volume": lambda path: ask_volume(path, RULES),
    "directory": lambda path: ask_directory(path, RULES),
    "pixels": lambda path: ask_pixels(Job(path, None, (None,), ("", "")), Form(28, 1, RULES)),
}


@pytest.mark.parametrize("what", ASKED)
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path, what: str) -> None:
    """Put there after the scan looked: to wait for a writer would take as long as an image may."""
    os.mkfifo(tmp_path / "pipe")
    with DecoderPool(RULES) as pool:
        (answer,) = pool.answers([ASKED[what](tmp_path / "pipe")])
    assert answer == (Reason.ARCHIVE if what == "member" else Reason.NOT_READABLE)
