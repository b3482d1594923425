import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from pydicom import DataElement, dcmread
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ImplicitVRLittleEndian,
    SegmentationStorage,
)

from client.intake import IntakeRules, Reason, records, scan
from client.intake.headers import MAX_VALUE, file_meta
from client.intake.selection import Practice, choose
from client.intake.sources import find
from common.errors import IntakeError
from tests.client.intake.pictures import read
from tests.client.intake.test_directory import dicomdir

WriteDicom = Callable[..., Path]


def data_set_starts(whole: bytes) -> int:
    """Return where the file meta, of which the length is not stated, ends."""
    source = io.BytesIO(whole)
    file_meta(source, IntakeRules())
    return source.tell()


def crowded(path: Path, items: int) -> bytes:
    """Return a deflated file with a private sequence of so many empty items before the patient."""
    whole = path.read_bytes()
    start = data_set_starts(whole)
    body = zlib.decompress(whole[start:], -zlib.MAX_WBITS)
    place = body.index(struct.pack("<HH", 0x10, 0x20))
    ends = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * items + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    sequence = struct.pack("<HH2sHL", 9, 0x1001, b"SQ", 0, 0xFFFFFFFF) + ends
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return whole[:start] + deflater.compress(body[:place] + sequence + body[place:]) + deflater.flush()


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_no_header_is_parsed_in_the_importing_process(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """Files, members of archives and what a DICOMDIR names: pydicom sees them in the decoders' processes alone."""
    folder = tmp_path / "source"
    one = write_dicom(folder / "ONE", PatientID="P1")
    zipped(folder / "a.zip", b=one.read_bytes())
    dicomdir(folder / "DICOMDIR", ["ONE"], ["TWO"])
    unread = AssertionError("parsed here")
    with (
        patch("client.intake.headers.read_dataset", side_effect=unread),
        patch("pydicom.filereader.read_dataset", side_effect=unread),
    ):
        tree, medium = scan(folder, "none"), scan(folder / "DICOMDIR", "none")
    assert [record.member for record in tree.records] == [None, "b"]
    assert tree.refused == {Reason.INDEX: 1, Reason.MISSING: 1}
    assert [record.path for record in medium.records] == [one]
    assert medium.refused == {Reason.MISSING: 1}


@pytest.mark.slow
def test_headers_are_bounded(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """A few kilobytes that pydicom would make half a gigabyte of are refused, and what stands beside is read."""
    folder = tmp_path / "source"
    good = write_dicom(folder / "good", syntax=DeflatedExplicitVRLittleEndian)
    bad = crowded(good, 600_000)
    assert len(bad) < 2**15
    (folder / "bad").write_bytes(bad)
    zipped(folder / "a.zip", bad=bad, good=crowded(good, 10))
    found = scan(folder, "none", IntakeRules(decode_seconds=600))
    assert [record.member for record in found.records] == ["good", None]
    assert found.refused == {Reason.TOO_LARGE: 2}


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_a_command_set_before_the_data_set_is_read(tmp_path: Path, write_dicom: WriteDicom, syntax: str) -> None:
    """Some archives keep what a C-STORE said; pydicom's dcmread reads over it."""
    path = write_dicom(tmp_path / "a", syntax=syntax, PatientID="P1")
    whole = path.read_bytes()
    start = data_set_starts(whole)
    command = struct.pack("<HHLL", 0, 0, 4, 10) + struct.pack("<HHLH", 0, 0x100, 2, 1)
    path.write_bytes(whole[:start] + command + whole[start:])
    found = scan(tmp_path, "none")
    assert [record.patient for record in found.records] == [("", "P1")]
    assert not read(found, ["all"], 28)[1]


def test_an_expression_that_never_ends_costs_its_file(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """Rules of labels are applied where the header is read, within the time for an answer."""
    folder = tmp_path / "source"
    write_dicom(folder / "a", StudyDescription="a" * 60 + "!")
    write_dicom(folder / "b", StudyDescription="chest")
    rules = tmp_path / "rules.toml"
    rules.write_text("[[label]]\nclass = 'some'\ntag = 'StudyDescription'\nmatches = '(\\w+\\s?)+$'\n")
    found = scan(folder, f"rules:{rules}", IntakeRules(workers=1, decode_seconds=8))
    assert [record.label for record in found.records] == ["some"]
    assert found.refused == {Reason.TOO_SLOW: 1}


SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


@pytest.mark.parametrize(
    ("keyword", "value", "vr"),
    [
        ("BurnedInAnnotation", "YES", "OB"),
        ("Modality", "US", "OB"),
        ("Modality", "US", "US"),
        ("ImageType", "DERIVED\\SECONDARY\\SCREEN SAVE", "OW"),
        ("Manufacturer", "acme", "OB"),
        ("IssuerOfPatientID", "H1", "OB"),
    ],
)
def test_what_is_judged_is_text(tmp_path: Path, write_dicom: WriteDicom, keyword: str, value: str, vr: str) -> None:
    """Under another VR a rule would see no value, and find nothing to refuse, to blank or to tell apart."""
    dataset = dcmread(write_dicom(tmp_path / "a", PatientID="P1"))
    dataset.add_new(keyword, vr, int.from_bytes(value.encode(), "little") if vr == "US" else value.encode())
    dataset.save_as(tmp_path / "a")
    assert find(tmp_path, "none").refused == {Reason.HEADER: 1}
    dataset[keyword] = DataElement(dataset[keyword].tag, "UN", value.encode())  # pydicom knows what it should be
    dataset.save_as(tmp_path / "a")
    assert not find(tmp_path, "none").refused


def with_meta_class(path: Path, kind: str) -> None:
    """Name another SOP class in the file meta alone."""
    dataset = dcmread(path)
    dataset.file_meta.MediaStorageSOPClassUID = UID(kind)
    dataset.save_as(path)


def test_the_file_meta_may_alone_say_what_it_is(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """A secondary capture, or a map of labels, that names its class nowhere else is none the less one."""
    for name, kind in (
        ("a", SECONDARY_CAPTURE),
        ("b", SegmentationStorage),
        ("c", DigitalXRayImageStorageForPresentation),
    ):
        with_meta_class(write_dicom(tmp_path / name, PatientID=name), kind)
    found = scan(tmp_path, "none")
    assert [(record.path.name, record.header["SOPClassUID"]) for record in found.records] == [
        ("a", SECONDARY_CAPTURE),
        ("c", DigitalXRayImageStorageForPresentation),
    ]
    assert found.refused == {Reason.NO_PICTURE: 1}
    choice = choose(found, Practice(tmp_path, "none"), None)
    assert [refusal.reason for refusal in choice.refusals] == [Reason.NO_PICTURE, Reason.SECONDARY_CAPTURE]


def test_two_sop_classes_are_refused(tmp_path: Path, write_dicom: WriteDicom) -> None:
    path = write_dicom(tmp_path / "a", SOPClassUID=DigitalXRayImageStorageForPresentation)
    assert len(scan(tmp_path, "none").records) == 1
    with_meta_class(path, SECONDARY_CAPTURE)
    with pytest.raises(IntakeError, match="SOP class"):
        scan(tmp_path, "none")


LONG = "A" * (MAX_VALUE + 1)


def with_text(path: Path, keyword: str, text: str) -> None:
    """Give an element a value that its VR does not allow."""
    dataset = dcmread(path)
    dataset.add_new(keyword, "UT", text)
    dataset.save_as(path)


@pytest.mark.parametrize("keyword", ["PatientID", "IssuerOfPatientID", "Manufacturer", "AdmittingDiagnosesDescription"])
def test_values_are_bounded(tmp_path: Path, write_dicom: WriteDicom, keyword: str) -> None:
    """They are kept for each image; cut, two patients could be taken for one."""
    tags = {"PatientID": "P1", "AdmittingDiagnosesDescription": "x"}
    with_text(write_dicom(tmp_path / "a", **tags), keyword, LONG[1:])
    with_text(write_dicom(tmp_path / "b", **tags, syntax=DeflatedExplicitVRLittleEndian), keyword, LONG)
    found = scan(tmp_path)
    assert [record.path.name for record in found.records] == ["a"]
    assert found.refused == {Reason.LONG_VALUE: 1}


def test_a_value_that_only_rules_of_labels_look_at_may_be_long(tmp_path: Path, write_dicom: WriteDicom) -> None:
    with_text(write_dicom(tmp_path / "source" / "a"), "ImageComments", LONG)
    rules = tmp_path / "rules.toml"
    rules.write_text("[[label]]\nclass = 'some'\ntag = 'ImageComments'\nmatches = '^A'\n")
    assert [record.label for record in scan(tmp_path / "source", f"rules:{rules}").records] == ["some"]


def test_all_values_together_are_bounded(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "a")
    path = write_dicom(tmp_path / "b", SpecificCharacterSet="ISO_IR 192")
    for keyword in ("PatientID", "IssuerOfPatientID", "Manufacturer", "ManufacturerModelName", "AccessionNumber"):
        with_text(path, keyword, "\u533b" * MAX_VALUE)
    found = scan(tmp_path, "none")
    assert [record.path.name for record in found.records] == ["a"]
    assert found.refused == {Reason.TOO_LARGE: 1}


def test_the_frames_of_a_source_are_bounded(
    tmp_path: Path, write_dicom: WriteDicom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together, of files of several; one that finds no room leaves it to others, and files of one need none."""
    monkeypatch.setattr(records, "MAX_FRAMES", 5)
    frame = np.zeros((8, 8), np.uint8)
    for name, frames in (("a", 3), ("b", 3), ("c", 2), ("d", 1), ("e", 1)):
        write_dicom(tmp_path / name, frame, NumberOfFrames=frames, PixelData=bytes(64 * frames), PatientID=name)
    found = scan(tmp_path, "none", IntakeRules(frames="all"))
    assert [record.path.name for record in found.records] == [*"aaaccde"]
    assert [(refusal.path.name, refusal.reason) for refusal in found.refusals] == [("b", Reason.SOURCE_FRAMES)]
    assert len(scan(tmp_path, "none", IntakeRules(frames="middle")).records) == 5


def test_a_label_that_nobody_asks_for_refuses_nothing(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """Labels come from the table or are none at all: how long a diagnosis is does not count."""
    with_text(write_dicom(tmp_path / "a"), "AdmittingDiagnosesDescription", LONG)
    assert [record.label for record in scan(tmp_path, "none").records] == ["all"]
    (tmp_path / "labels.csv").write_text("file,label\na,x\n")
    assert [[record.label for record in scan(tmp_path, label).records] for label in ("auto", "column:label")] == [
        ["x"]
    ] * 2
