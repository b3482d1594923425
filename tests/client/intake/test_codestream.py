import io
import struct
from collections.abc import Callable
from pathlib import Path

import jpeg_ls
import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless

from client.intake.codestream import depth_of, has_signs, rounds, shape_of
from client.intake.refusals import Refused
from client.intake.rules import IntakeRules
from client.intake.worker import Source

WriteDicom = Callable[..., Path]
RAMP = np.tile(np.arange(128, dtype=np.uint8) * 2, (32, 1))


def packed(pixels: np.ndarray, kind: str) -> bytes:
    if kind == "JPEG-LS":
        return bytes(jpeg_ls.encode(pixels))
    content = io.BytesIO()
    options = {"JPEG2000": {"no_jp2": True}, "JP2": {"no_jp2": False}}.get(kind, {"quality": 95})
    Image.fromarray(pixels).save(content, "JPEG2000" if kind == "JP2" else kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000", "JP2", "JPEG-LS"])
def test_the_shape_of_a_codestream(kind: str) -> None:
    assert shape_of(packed(RAMP, kind)) == (32, 128, 1)
    if kind != "JPEG-LS":
        assert shape_of(packed(np.zeros((32, 20, 3), np.uint8), kind)) == (32, 20, 3)
    whole = packed(RAMP, kind)
    for end in range(11):
        with pytest.raises((ValueError, struct.error)):
            shape_of(whole[:end])


def test_what_is_no_codestream_has_no_shape() -> None:
    for data in (b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xe0\0\x04ab\xff\xda", b"\xff\xd8ab", bytes(100)):
        with pytest.raises(ValueError, match="no "):
            shape_of(data)


@pytest.mark.parametrize(
    ("kind", "syntax"), [("JPEG", JPEGBaseline8Bit), ("JPEG2000", JPEG2000Lossless), ("JPEG-LS", JPEGLSLossless)]
)
@pytest.mark.parametrize("shape", [(32, 128), (64, 64), (128, 32), (16, 128), (32, 64)])
def test_codestreams_have_the_headers_shape(
    tmp_path: Path, write_dicom: WriteDicom, kind: str, syntax: str, shape: tuple[int, int]
) -> None:
    """As many pixels in other rows would be a sheared picture."""
    pixels = encapsulate([packed(RAMP, kind)])
    path = write_dicom(tmp_path / "a", np.zeros(shape, np.uint8), syntax=syntax, PixelData=pixels)
    source = Source(path, None, IntakeRules(percentiles=(0, 100)))
    if shape == RAMP.shape:
        assert np.allclose(source.levels(None), RAMP * (255 / 254), atol=4)
    else:
        with pytest.raises(Refused, match="pixels not decodable"):
            source.levels(None)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000", "JP2", "JPEG-LS"])
def test_the_depth_of_a_codestream(kind: str) -> None:
    assert depth_of(packed(RAMP, kind)) == 8
    if kind != "JPEG":
        assert depth_of(packed(RAMP.astype(np.uint16) * 257, kind)) == 16
        whole = packed(RAMP, "JPEG2000")
        assert depth_of(whole[:42] + bytes([0x8B]) + whole[43:]) == 12  # with signs


def test_what_a_codestream_may_lose() -> None:
    assert [rounds(packed(RAMP, kind)) for kind in ("JPEG", "JPEG2000", "JP2", "JPEG-LS")] == [
        True,
        False,
        False,
        False,
    ]
    assert rounds(packed(RAMP, "JPEG").replace(b"\xff\xc0", b"\xff\xc3")) is False
    assert rounds(bytes(jpeg_ls.encode(RAMP, 1)))
    lossy = io.BytesIO()
    Image.fromarray(RAMP).save(lossy, "JPEG2000", irreversible=True)
    assert rounds(lossy.getvalue())
    for kind, end in (("JPEG", 30), ("JPEG2000", 55), ("JPEG-LS", 20)):
        with pytest.raises((ValueError, struct.error)):
            rounds(packed(RAMP, kind)[:end])


def test_the_sign_of_a_codestream() -> None:
    whole = packed(RAMP, "JPEG2000")
    assert not any(has_signs(packed(RAMP, kind)) for kind in ("JPEG", "JPEG2000", "JP2", "JPEG-LS"))
    assert has_signs(whole[:42] + bytes([0x87]) + whole[43:])
    with pytest.raises(struct.error):
        has_signs(whole[:42])


@pytest.mark.parametrize(("signed", "marked", "read"), [(0, 0, True), (1, 1, True), (1, 0, True), (0, 1, False)])
def test_codestreams_have_the_headers_sign(
    tmp_path: Path, write_dicom: WriteDicom, signed: int, marked: int, read: bool
) -> None:
    """Values below zero read as unsigned would be the brightest. Signed words packed as unsigned are known."""
    values = np.tile(np.arange(-2048, 2048, 32, dtype=np.int16), (32, 1))
    dataset = dcmread(write_dicom(tmp_path / "a", values, PixelRepresentation=marked))
    if not marked:
        dataset.PixelData = (values & 0xFFF).tobytes()
    dataset.compress(JPEG2000Lossless)
    dataset.PixelRepresentation = signed
    dataset.save_as(tmp_path / "a")
    source = Source(tmp_path / "a", None, IntakeRules(percentiles=(0, 100)))
    if read:
        expected = values.astype(float) if signed else (values & 0xFFF).astype(float)
        low, high = expected.min(), expected.max()
        assert np.allclose(source.levels(None), (expected - low) * (255 / (high - low)), atol=1e-3)
    else:
        with pytest.raises(Refused, match="pixels not decodable"):
            source.levels(None)


def test_a_codestream_of_another_shape_is_not_decoded(
    tmp_path: Path, write_dicom: WriteDicom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.4 KB of JPEG 2000 may state 12,000 x 12,000 pixels, which a decoder allocates."""
    pixels = encapsulate([packed(np.zeros((600, 600), np.uint8), "JPEG2000")])
    path = write_dicom(tmp_path / "a", np.zeros((64, 64), np.uint8), syntax=JPEG2000Lossless, PixelData=pixels)
    source = Source(path, None, IntakeRules())
    monkeypatch.setattr("client.intake.dicom.get_decoder", pytest.fail)
    with pytest.raises(Refused, match="pixels not decodable"):
        source.levels(None)
