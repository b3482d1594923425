"""Text in pictures: what is refused, what is made black; labels by rules."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from client.intake import Reason, decode_records, scan, screening
from client.intake.deidentify import BlankRules, doubt, read_blank_rules
from client.intake.labels import read_label_rules
from client.intake.patients import Patient
from client.intake.records import Record, Scan
from client.intake.selection import Practice, choose
from client.policy import Doubtful
from common.errors import ConfigError
from tests.client.intake.conftest import WriteDicom


def record(**header: str) -> Record:
    return Record(Path("x"), None, ("", "p"), "all", None, header=header)


DOUBTFUL: list[tuple[Doubtful, dict[str, str], Reason]] = [
    ("burned-in", {"BurnedInAnnotation": "YES"}, Reason.BURNED_IN),
    ("burned-in", {"BurnedInAnnotation": "YES\\YES"}, Reason.BURNED_IN),
    ("burned-in", {"BurnedInAnnotation": "NO\\ yes"}, Reason.BURNED_IN),
    ("secondary-capture", {"SOPClassUID": "1.2\\1.2.840.10008.5.1.4.1.1.7"}, Reason.SECONDARY_CAPTURE),
    ("ultrasound", {"Modality": "CR\\US"}, Reason.ULTRASOUND),
    ("secondary-capture", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, Reason.SECONDARY_CAPTURE),
    ("secondary-capture", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.4"}, Reason.SECONDARY_CAPTURE),
    ("secondary-capture", {"ImageType": "DERIVED\\SECONDARY\\SCREEN SAVE"}, Reason.SECONDARY_CAPTURE),
    ("secondary-capture", {"ConversionType": "WSD"}, Reason.SECONDARY_CAPTURE),
    ("ultrasound", {"Modality": "US"}, Reason.ULTRASOUND),
    ("ultrasound", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"}, Reason.ULTRASOUND),
]


@pytest.mark.parametrize(("kind", "header", "reason"), DOUBTFUL)
def test_doubtful_is_refused(kind: Doubtful, header: dict[str, str], reason: Reason) -> None:
    assert doubt(record(**header), ()) is reason
    assert doubt(record(**header), (kind,)) is None


def test_what_is_in_no_doubt() -> None:
    header = {"BurnedInAnnotation": "NO", "Modality": "CR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.6"}
    assert doubt(record(**header, ImageType="ORIGINAL\\PRIMARY"), ()) is None


RULES = """
[[blank]]
modality = "DX"
manufacturer = "acme"
regions = [[0, 0, 16, 4], [12, 0, 100, 100]]
[[blank]]
rows = 24
columns = 16
regions = [[0, 20, 16, 4]]
"""


def test_all_that_fit(tmp_path: Path, write_dicom: WriteDicom) -> None:
    (tmp_path / "blank.toml").write_text(RULES)
    rules = read_blank_rules(tmp_path / "blank.toml")
    folder, bright = tmp_path / "source", np.full((24, 16), 4000, np.uint16)
    write_dicom(folder / "a", bright, Modality="DX", Manufacturer="ACME Ltd", WindowCenter=2048, WindowWidth=4096)
    write_dicom(folder / "b", bright, Modality="CR", PatientID="P2", WindowCenter=2048, WindowWidth=4096)
    choice = choose(scan(folder, "none"), Practice(folder, "none", blank=rules), None)
    assert [len(one.blank) for one in choice.records] == [3, 1]
    (_, first), (_, second) = decode_records(choice.records, 24)
    assert not isinstance(first, str)
    assert not isinstance(second, str)
    assert first[0, :4].max() == 0 == first[0, 20:].max() == first[0, :, 16:].max()
    assert first[0, 6:18, 5:14].min() > 200
    assert second[0, :18, 5:19].min() > 200
    assert second[0, 20:].max() == 0


@pytest.mark.parametrize(
    "text",
    [
        "[[blank]]\nregions = [[0, 0, 1, 1]]",
        "[[blank]]\nmodality = 'US'\nregions = []",
        "[[blank]]\nmodality = 'US'\nregions = [[0, 0, 1]]",
        "[[blank]]\nmodality = 'US'\nregions = [[0, 0, 0, 1]]",
        "[[blank]]\nmodality = 'US'\nregions = [[-1, 0, 1, 1]]",
        "[[blank]]\nmodality = 'US'\nregion = [[0, 0, 1, 1]]",
        "[blank",
    ],
)
def test_strict_regions(tmp_path: Path, text: str) -> None:
    (tmp_path / "blank.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"blank\.toml"):
        read_blank_rules(tmp_path / "blank.toml")
    assert BlankRules().regions(record()) == ()


LABELS = """
[[label]]
class = "effusion"
tag = "StudyDescription"
matches = "(?i)effusion"
[[label]]
class = "lateral"
tag = "ViewPosition"
matches = "^LL$"
"""


def test_first_match(tmp_path: Path, write_dicom: WriteDicom) -> None:
    path, folder = tmp_path / "labels.toml", tmp_path / "source"
    path.write_text(LABELS)
    write_dicom(folder / "a", StudyDescription="Pleural EFFUSION", ViewPosition="LL")
    write_dicom(folder / "b", ViewPosition="LL")
    write_dicom(folder / "c", StudyDescription="normal")
    assert [one.label for one in scan(folder, f"rules:{path}").records] == ["effusion", "lateral", None]
    path.write_text(LABELS + '[[label]]\nclass = "other"\n')
    assert [one.label for one in scan(folder, f"rules:{path}").records][2] == "other"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[[label]]\ntag = 'Modality'\nmatches = 'CT'",
        "[[label]]\nclass = 'a'\ntag = 'Modality'",
        "[[label]]\nclass = 'a'\ntag = 'Modality'\nmatches = '('",
        "[[label]]\nclass = 'a'\nwhat = 1",
        "label = 3",
        "[[label",
    ],
)
def test_strict_labels(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"labels\.toml"):
        read_label_rules(tmp_path / "labels.toml")


def test_a_tag_that_is_no_keyword(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "source" / "a")
    (tmp_path / "labels.toml").write_text("[[label]]\nclass = 'a'\ntag = 'Finding'\nmatches = 'x'\n")
    with pytest.raises(ConfigError, match="DICOM keywords"):
        scan(tmp_path / "source", f"rules:{tmp_path / 'labels.toml'}")


class InUse:
    """One instance that is in use already, for somebody else."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __contains__(self, name: object) -> bool:
        return name == self.name

    def of_another(self, name: str, patient: Patient) -> bool:
        return name == self.name


def test_an_instance_once(tmp_path: Path) -> None:
    names = [("a", "1.1"), ("b", "1.1"), ("c", "1.2"), ("c", "1.2"), ("d", ""), ("e", "")]
    records = [replace(record(SOPInstanceUID=sop) if sop else record(), path=tmp_path / name) for name, sop in names]
    choice = choose(Scan(tuple(records), {}), Practice(tmp_path), None, InUse("1.2#None"))
    assert [one.path.name for one in choice.records] == ["a", "d", "e"]
    assert [one.reason for one in choice.refusals] == [Reason.DUPLICATE] * 3


def test_accounted(write_dicom: WriteDicom, tmp_path: Path) -> None:
    write_dicom(tmp_path / "a", SOPInstanceUID="1.1")
    write_dicom(tmp_path / "b", SOPInstanceUID="1.1")
    write_dicom(tmp_path / "c", Modality="US", SOPInstanceUID="1.3")
    (tmp_path / "d").write_text("x")
    found = scan(tmp_path, "none")
    choice = choose(found, Practice(tmp_path, "none"), None)
    assert [one.reason for one in choice.refusals] == [Reason.NOT_DICOM, Reason.DUPLICATE, Reason.ULTRASOUND]
    assert len(choice.records) + len(choice.refusals) == len(found.records) + len(found.refusals)


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="tesseract is not installed")
def test_screening_finds_words() -> None:
    image = Image.new("L", (1024, 1024), 0)
    ImageDraw.Draw(image).text((60, 60), "SMITH JOHN 1950", fill=255, font=ImageFont.load_default(64))
    assert (screening.words_in(np.asarray(image)[None]) or 0) >= 2
    assert screening.words_in(np.zeros((1, 1024, 1024), np.uint8)) == 0


def test_screening_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "tesseract"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert screening.words_in(np.zeros((1, 8, 8), np.uint8), seconds=0.3) is None
    slow.write_text("#!/bin/sh\necho text\nexit 1\n")
    assert screening.words_in(np.zeros((1, 8, 8), np.uint8)) is None
