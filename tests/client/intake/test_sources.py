import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from client.intake import IntakeRules, Reason, folders, scan, worker
from client.intake.deidentify import read_blank_rules
from client.intake.folders import scan_folder
from client.intake.labels import TagLabel, read_label_rules
from client.intake.page import save_page
from client.intake.patients import read_patient_table
from client.intake.records import Known, LabelSource
from client.intake.report import Listing
from client.intake.requests import ask_header as real
from client.intake.selection import Practice
from client.intake.sources import find
from client.intake.survey import Row, survey
from common.errors import ConfigError, IntakeError, StorageError, UnreadableSource
from tests.client.intake.pictures import read

WriteDicom = Callable[..., Path]


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSource, match="does not exist"):
        scan(tmp_path / "nothing")
    with pytest.raises(IntakeError, match="empty"):
        scan(tmp_path)
    (tmp_path / "notes.txt").write_text("SECRET")
    with pytest.raises(IntakeError, match="1 not DICOM"):
        scan(tmp_path)
    with pytest.raises(IntakeError, match="NPZ file or a folder"):
        scan(tmp_path / "notes.txt")


@pytest.mark.parametrize("label", ["", "tag", "tag:", "column: ", "Auto", "csv:x"])
def test_label_forms(tmp_path: Path, label: str) -> None:
    with pytest.raises(ConfigError, match="--label"):
        scan(tmp_path, label)


def test_one_bad_file_stops_nothing(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "good", PatientID="SECRET")
    (tmp_path / "bad").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 100)
    dataset, refused = read(scan(tmp_path, "none"), ["all"], 28)
    assert len(dataset.images) == 1
    assert sum(refused.values()) == 1


def test_what_a_pull_has_not_kept_yet_is_not_looked_into(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """It may be half, or an image that was never asked for; a pull that is killed leaves it."""
    write_dicom(tmp_path / "ab" / "kept.dcm", PatientID="A")
    write_dicom(tmp_path / ".incoming" / "tmp1.dcm", PatientID="SOMEBODY")
    write_dicom(tmp_path / "ab" / ".incoming" / "other.dcm", PatientID="B")  # that name elsewhere is any folder's
    found = scan(tmp_path, "none")
    assert {record.path.name for record in found.records} == {"other.dcm", "kept.dcm"}
    assert not found.refused


def test_an_inbox_where_nothing_is_kept_yet_is_empty(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / ".incoming" / "tmp1.dcm")
    with pytest.raises(IntakeError, match="empty"):
        scan(tmp_path)


def test_deterministic_order(tmp_path: Path, write_dicom: WriteDicom) -> None:
    for name in ("b", "z/a", "a", "c/d/e", "c/a"):
        write_dicom(tmp_path / name)
    names = [record.path.relative_to(tmp_path).as_posix() for record in scan(tmp_path, "none").records]
    assert names == ["a", "b", "c/a", "c/d/e", "z/a"]


def test_known_files_are_not_opened(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """What is unchanged could be unreadable by now; what is new or changed is read."""
    for name in ("a", "b", "c"):
        write_dicom(tmp_path / name, PatientID=name)
    (tmp_path / "d").write_text("no image")
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.write(tmp_path / "a", "one")
    (tmp_path / "labels.csv").write_text("file,label\na,x\nb,x\nc,x\ne.zip/one,x\n")
    first = scan(tmp_path)
    known = {(item.path, item.stamp, item.beside) for item in (*first.records, *first.refusals)}
    write_dicom(tmp_path / "b", PatientID="changed", Modality="CR")
    (tmp_path / "labels.csv").write_text("file,label\na,x\nb,x\nc,y\ne.zip/one,x\n")
    opened: list[str] = []
    with patch.object(folders, "ask_header", side_effect=lambda *all_: (opened.append(all_[0].name), real(*all_))[1]):
        second = scan(tmp_path, known=Known(lambda *about: about in known))
    assert opened == ["b", "c"]
    assert [path.name for path in second.skipped] == ["a", "d", "e.zip"]
    assert [(record.patient[1], record.label) for record in second.records] == [("changed", "x"), ("c", "y")]
    assert not second.refusals


def test_an_npz_alone_in_a_folder_is_the_source(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8), np.uint8), patient_id=np.arange(2))
    assert len(scan(tmp_path, "none").records) == 2


def test_patients_adjacent(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 20, 100)
    images = np.broadcast_to(patients.astype(np.uint8)[:, None, None], (100, 28, 28))
    np.savez(tmp_path / "images.npz", images=images, patient_id=patients, labels=rng.integers(0, 2, 100))
    dataset, _ = read(scan(tmp_path), ["0", "1"], 28)
    values = dataset.images[:, 0, 0, 0]
    starts = np.flatnonzero(np.diff(dataset.patients))
    assert len(starts) == dataset.number_of_patients - 1
    assert len(set(zip(values.tolist(), dataset.patients.tolist(), strict=True))) == dataset.number_of_patients
    assert [str(values[0]), *(str(values[start + 1]) for start in starts)] == sorted({str(one) for one in patients})


def test_no_cross_patient_statistics(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """Every patient's pixels are the same with and without each other patient."""
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 2 ** (8 + number), (30, 20), dtype=np.uint16)
        write_dicom(tmp_path / f"{number}", pixels, PatientID=f"P{number}")
    everyone, _ = read(scan(tmp_path, "none"), ["all"], 32)
    (tmp_path / "2").unlink()
    others, _ = read(scan(tmp_path, "none"), ["all"], 32)
    assert np.array_equal(np.delete(everyone.images, 2, axis=0), others.images)


def test_a_file_that_goes_away_is_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    (tmp_path / "index.csv").write_text("file,patient\na.png,1\nb.png,2\n")
    found = scan(tmp_path, "none")
    (tmp_path / "a.png").unlink()
    assert read(found, ["all"], 28)[1] == {Reason.MISSING: 1}


STRAYS = {
    "images.npz": None,
    "patients.csv": "patient,to\nA,B\n",
    "worklist.csv": "file,patient\nelsewhere.png,A\n",
    "pull.csv": "accession\n1\n",
}


@pytest.mark.parametrize("strays", [[name] for name in STRAYS] + [list(STRAYS)])
def test_files_beside_do_not_replace_a_dicom_tree(tmp_path: Path, write_dicom: WriteDicom, strays: list[str]) -> None:
    for number in range(3):
        write_dicom(tmp_path / "deep" / f"{number}", PatientID=f"P{number}")
    for name in strays:
        if (text := STRAYS[name]) is None:
            np.savez(tmp_path / name, images=np.zeros((2, 8, 8), np.uint8), patient_id=np.arange(2))
        else:
            (tmp_path / name).write_text(text)
    found = scan(tmp_path, "none")
    assert (len(found.records), found.refused, found.kind) == (3, {Reason.NOT_DICOM: len(strays)}, "DICOM folder")


def test_a_zip_is_not_replaced_either(tmp_path: Path, write_dicom: WriteDicom) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(write_dicom(tmp_path / "other" / "a"), "a")
    (tmp_path / "other" / "a").unlink()
    (tmp_path / "export.csv").write_text("file,patient\na,A\n")
    found = scan(tmp_path, "none")
    assert (len(found.records), found.refused) == (1, {Reason.NOT_DICOM: 1})


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / name)


def test_what_an_index_does_not_name_is_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "deep/c.png")
    (tmp_path / "index.csv").write_text("file,patient\na.png,1\ndeep/c.png,1\n")
    (tmp_path / "worklist.csv").write_text("file,patient\nb.png,9\n")
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8), np.uint8), patient_id=np.arange(2))
    found = scan(tmp_path, "none")
    assert (len(found.records), found.refused) == (2, {Reason.NOT_OF_SOURCE: 3})
    assert found.kind == "files that an index CSV names"
    assert {refusal.path.name for refusal in found.refusals} == {"b.png", "worklist.csv", "images.npz"}


def test_one_csv_file_of_any_name_is_the_index(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "mine.csv").write_text("file,patient\na.png,1\n")
    (tmp_path / "patients.csv").write_text("patient,to\n1,2\n")
    found = scan(tmp_path, "none")
    assert (len(found.records), found.refused) == (1, {Reason.NOT_OF_SOURCE: 1})
    (tmp_path / "other.csv").write_text("file,patient\na.png,2\n")
    with pytest.raises(IntakeError, match="several CSV files with a column file"):
        scan(tmp_path, "none")
    assert [record.patient[1] for record in scan(tmp_path / "other.csv", "none").records] == ["2"]


def test_what_stands_beside_an_npz_is_counted(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8), np.uint8), patient_id=np.array(["", "b"]))
    pictures(tmp_path, "png/a.png")
    (tmp_path / "notes.csv").write_text("said\nnothing\n")
    found = scan(tmp_path, "none")
    assert (len(found.records), found.refused) == (1, {Reason.NO_PATIENT: 1, Reason.NOT_OF_SOURCE: 2})


@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_a_folder_that_cannot_be_entered(permissions: Path, write_dicom: WriteDicom, mode: int) -> None:
    """Whatever its mode lets be seen of it: one refusal, and the rest is read."""
    for name in ("a", "closed/b", "closed/deep/c", "open/d"):
        write_dicom(permissions / name)
    (permissions / "closed").chmod(mode)
    found = scan(permissions, "none")
    assert [record.path.name for record in found.records] == ["a", "d"]
    assert (found.refused, found.refusals[0].path) == ({Reason.FOLDER: 1}, permissions / "closed")
    permissions.chmod(mode)
    with pytest.raises(UnreadableSource, match="Permission denied") as caught:
        scan(permissions, "none")
    assert str(permissions) not in str(caught.value)
    permissions.chmod(0o700)


def test_a_file_that_cannot_be_read_is_not_missing(permissions: Path, write_dicom: WriteDicom) -> None:
    write_dicom(permissions / "a")
    write_dicom(permissions / "zips" / "a")
    with zipfile.ZipFile(permissions / "zips" / "c.zip", "w") as archive:
        archive.write(permissions / "a", "a")
    (permissions / "a").chmod(0)
    (permissions / "zips" / "c.zip").chmod(0)
    assert scan(permissions / "zips", "none").refused == {Reason.NOT_READABLE: 1}
    labels = TagLabel(tag="Modality").model_dump_json(by_alias=True)
    reply = worker._listed({"path": str(permissions / "a"), "member": None, "labels": labels}, IntakeRules())
    assert reply[2:].decode() == Reason.NOT_READABLE
    pictures(permissions, "a.png", "b.png")
    (permissions / "index.csv").write_text("file,patient\na.png,1\nb.png,1\nc.png,1\n")
    (permissions / "b.png").chmod(0)
    refused = scan(permissions, "none").refused
    assert (refused[Reason.NOT_READABLE], refused[Reason.MISSING]) == (1, 1)


def test_the_ending_of_a_name_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "report.doe_john_19500101"
    path.write_text("no image")
    with pytest.raises(IntakeError, match="Expected an NPZ file") as caught:
        scan(path, "none")
    assert "doe" not in str(caught.value)


def test_names_are_shown_in_letters_that_can_be_written(tmp_path: Path) -> None:
    """A name may be no UTF-8, or hold what commands a terminal."""
    path = tmp_path / os.fsdecode(b"\xe9\x1b[2Jbild\xc3\xa9.txt")
    path.write_text("no image")
    found = scan_folder(tmp_path, LabelSource("none"), IntakeRules())
    assert Listing(found, tmp_path, show_files=True).name(path) == "\\udce9\\x1b[2Jbildé.txt"
    shown = survey(Practice(tmp_path, "none"), show_files=True)
    assert "bildé" in shown.report.refused[0].examples[0]
    save_page(tmp_path / "page", shown.report, [Row("all", (("é", np.zeros((1, 128, 128), np.uint8)),))])
    "\n".join(shown.report.lines()).encode()


def test_rows_of_labels_without_a_file_are_counted(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """Also where the files that the others name are known and not opened; where no row fits, that is said."""
    write_dicom(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(tmp_path / "a", "in")
    rows = "file,label\na,x\nb.zip/in,x\nb.zip/gone,x\nnowhere,x\n../a,x\n"
    (tmp_path / "labels.csv").write_text(rows)
    found = scan(tmp_path)
    assert (len(found.records), found.refused) == (2, {Reason.MISSING: 3})
    assert [refusal.line for refusal in found.refusals] == [4, 5, 6]
    (missing,) = survey(Practice(tmp_path)).report.refused
    assert missing.examples == ("line 4", "line 5", "line 6")
    assert find(tmp_path, "auto", known=Known(lambda path, _stamp, _beside: path.name == "a")).refused == {
        Reason.MISSING: 3
    }
    known = find(
        tmp_path, "auto", known=Known(lambda *_: True)
    )  # members of an archive that is not opened are not looked at
    assert known.refused == {Reason.MISSING: 2}
    (tmp_path / "labels.csv").write_text("file,label\nimages/a,x\n")
    with pytest.raises(IntakeError, match=r"None of 1 rows of labels.csv names a file that is there"):
        scan(tmp_path)
    assert len(scan(tmp_path, "none").records) == 2


def nest(folder: Path, name: str, depth: int) -> None:
    """Make folders in each other, beyond the longest path that the system takes."""
    at = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=at)
        inner = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)


@pytest.mark.parametrize("source", ["tree", "index", "arrays"])
def test_a_path_that_is_too_long(tmp_path: Path, write_dicom: WriteDicom, source: str) -> None:
    """The folder at the end of it is counted, whatever the source is taken for, and the rest is read."""
    if source == "tree":
        write_dicom(tmp_path / "a.dcm")
        (tmp_path / "notes.csv").write_text("file,patient\n")
    elif source == "index":
        pictures(tmp_path, "a.png")
        (tmp_path / "index.csv").write_text("file,patient\na.png,P1\n")
    else:
        np.savez(tmp_path / "a.npz", images=np.zeros((1, 8, 8), np.uint8), patient_id=["P1"])
    nest(tmp_path, "n" * 200, 22)
    found = scan(tmp_path, "none")
    assert (len(found.records), found.refused.get(Reason.FOLDER)) == (1, 1)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", [pipe, zeros])
def test_a_pipe_neither_waits_nor_a_device_fills(
    tmp_path: Path, write_dicom: WriteDicom, put: Callable[[Path], None]
) -> None:
    """Whatever is read in this process: each table, an NPZ, rules; else the one file is counted."""
    for name in ("index.csv", "labels.csv", "x.npz"):
        (folder := tmp_path / f"of {name}").mkdir()
        put(folder / name)
        with pytest.raises(IntakeError, match="not a regular file"):
            scan(folder, "none")
    write_dicom(tmp_path / "beside" / "a.dcm")
    put(tmp_path / "beside" / "notes.csv")
    put(tmp_path / "beside" / "x.npz")
    found = scan(tmp_path / "beside", "none")
    assert (len(found.records), found.refused) == (1, {Reason.NOT_A_FILE: 2})
    put(tmp_path / "rules")
    for read_file in (read_label_rules, read_blank_rules):
        with pytest.raises(StorageError, match="not a regular file"):
            read_file(tmp_path / "rules")
    with pytest.raises(StorageError, match="not a regular file"):
        Practice(tmp_path, f"rules:{tmp_path / 'rules'}").digest()
    with pytest.raises(IntakeError, match="not a regular file"):
        read_patient_table(tmp_path / "rules")


def test_the_slashes_of_windows_in_labels(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """In the table, and in the names that some programs on Windows give to members; what stands so stays so."""
    for number, name in enumerate(("deep/a", r"deep\b", "c", "d", "e"), 1):
        write_dicom(tmp_path / name, PatientID=str(number), SOPInstanceUID=f"1.2.{number}")
    with zipfile.ZipFile(tmp_path / "deep" / "f.zip", "w") as archive:
        for name, member in (("c", "c"), ("d", r"in\d"), ("e", "in/e"), ("e", r"in\e")):
            archive.write(tmp_path / name, member)
    for name in "cde":
        (tmp_path / name).unlink()
    rows = (r"deep\a,x", r"deep\b,y", r"deep\f.zip\c,z", r"deep\f.zip\in\d,u", r"deep/f.zip/in\e,v")
    (tmp_path / "labels.csv").write_text("\n".join(("file,label", *rows)) + "\n")
    found = scan(tmp_path)
    labels = {record.member or record.path.name: record.label for record in found.records}
    assert labels == {"a": "x", r"deep\b": "y", "c": "z", r"in\d": "u", "in/e": "v", r"in\e": None}
    assert not found.refusals


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("put", [pipe, Path.mkdir, dangling])
def test_labels_that_are_no_file_stop_only_who_asks_for_them(
    tmp_path: Path, write_dicom: WriteDicom, put: Callable[[Path], None]
) -> None:
    write_dicom(tmp_path / "a", PatientID="P1", Modality="CT")
    put(tmp_path / "labels.csv")
    assert [[record.label for record in scan(tmp_path, label).records] for label in ("none", "tag:Modality")] == [
        ["all"],
        ["CT"],
    ]
    for label in ("auto", "column:label"):
        with pytest.raises(IntakeError, match="could not be read"):
            scan(tmp_path, label)
