from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage

from client.intake import IntakeRules, Reason, Refused, scan
from client.intake.directory import named_files
from common.errors import IntakeError

WriteDicom = Callable[..., Path]
SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "dicom_pydicom"


def dicomdir(path: Path, *names: list[str]) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MediaStorageDirectoryStorage, "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    records = []
    for name in names:
        record = Dataset()
        record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", name
        records.append(record)
    dataset.DirectoryRecordSequence = records
    dataset.save_as(path, enforce_file_format=False)
    return path


def test_a_dicomdir_is_a_source(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "A" / "ONE")
    write_dicom(tmp_path / "a" / "two")
    write_dicom(tmp_path / "UNNAMED")
    path = dicomdir(tmp_path / "DICOMDIR", ["A", "ONE"], ["A", "TWO"], ["A", "GONE"])
    found = scan(path, "none")
    assert [record.path.relative_to(tmp_path).as_posix() for record in found.records] == ["A/ONE", "a/two"]
    assert found.refused == {Reason.MISSING: 1}
    tree = scan(tmp_path, "none")
    assert len(tree.records) == 3
    assert tree.refused == {Reason.INDEX: 1, Reason.MISSING: 1}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_never_outside(tmp_path: Path, write_dicom: WriteDicom) -> None:
    outside = write_dicom(tmp_path / "OUTSIDE")
    medium = tmp_path / "medium"
    medium.mkdir()
    (medium / "LINK").symlink_to(outside)
    (medium / "FOLDER").symlink_to(tmp_path)
    names = (["..", "OUTSIDE"], [str(outside)], ["LINK"], ["FOLDER", "OUTSIDE"], ["A/../../OUTSIDE"], ["X" * 5000])
    path = dicomdir(medium / "DICOMDIR", *names)
    assert list(named_files(path, IntakeRules())) == [Reason.OUTSIDE] * 5 + [Reason.MISSING]


def test_a_damaged_dicomdir_is_an_error_or_counted(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "ONE")
    path = dicomdir(tmp_path / "DICOMDIR", ["ONE"])
    whole = path.read_bytes()
    start = whole.index(b"1.2.840.10008.1.2.1\0")
    path.write_bytes(whole[: start - 2] + b"\x16\0" + b"1.2.840.10008.1.2.1.99" + whole[start + 20 :])
    with pytest.raises(Refused):
        list(named_files(path, IntakeRules()))
    with pytest.raises(IntakeError, match="DICOMDIR"):
        scan(path, "none")
    assert scan(tmp_path, "none").refused == {Reason.INDEX: 1}


@pytest.mark.skipif(not SHARED.exists(), reason="the shared test data are not on this machine")
def test_the_files_that_a_real_dicomdir_names() -> None:
    path = next(path for path in sorted(SHARED.rglob("DICOMDIR")) if path.parent.name == "dicomdirtests")
    named = list(named_files(path, IntakeRules()))
    there = [one for one in named if isinstance(one, Path)]
    assert len(there) == len(named) > 20
