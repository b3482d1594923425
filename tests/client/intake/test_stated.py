"""What a header states and the file does not hold."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from client.intake import IntakeRules, Reason, scan
from common.errors import IntakeError

WriteDicom = Callable[..., Path]


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_frames_are_there(tmp_path: Path, write_dicom: WriteDicom, syntax: str) -> None:
    """A header alone would make thousands of records."""
    frame = np.zeros((24, 16), np.uint16)
    whole = frame.tobytes() * 5
    for name, frames, pixels in (("good", 5, whole), ("short", 5, whole[:-2]), ("none", 4096, None)):
        write_dicom(tmp_path / name, frame, syntax, NumberOfFrames=frames, PixelData=pixels, PatientID=name)
    found = scan(tmp_path, "none", IntakeRules(frames="all"))
    assert [record.path.name for record in found.records] == ["good"] * 5
    assert found.refused == {Reason.PIXELS: 1, Reason.NO_IMAGE: 1}
    if syntax != DeflatedExplicitVRLittleEndian:
        data = (tmp_path / "good").read_bytes()
        (tmp_path / "good").write_bytes(data[:-2])  # the length is stated as before
        with pytest.raises(IntakeError, match="2 pixels not decodable"):
            scan(tmp_path, "none", IntakeRules(frames="all"))


def test_packed_frames_are_there(tmp_path: Path, write_dicom: WriteDicom) -> None:
    for name, stated in (("good", 3), ("short", 4096)):
        frames = encapsulate([bytes(64)] * 3)
        write_dicom(tmp_path / name, None, RLELossless, NumberOfFrames=stated, PixelData=frames, PatientID=name)
    found = scan(tmp_path, "none", IntakeRules(frames="all"))
    assert [record.path.name for record in found.records] == ["good"] * 3
    assert found.refused == {Reason.PIXELS: 1}


def test_subsampled_colours_take_two_thirds(tmp_path: Path, write_dicom: WriteDicom) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    tags = {"PhotometricInterpretation": "YBR_FULL_422", "NumberOfFrames": 2}
    write_dicom(tmp_path / "a", pixels, PixelData=bytes(8 * 8 * 2 * 2), **tags)
    assert len(scan(tmp_path, "none", IntakeRules(frames="all")).records) == 2
