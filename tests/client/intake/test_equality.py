"""One picture, written in every way that a PACS might, gives one tensor."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from client.intake import IntakeRules, scan
from client.intake.refusals import quiet
from client.intake.worker import Form, Source
from tests.client.intake.pictures import read

WriteDicom = Callable[..., Path]
SIDE = 64


def picture() -> np.ndarray:
    """Smooth, with an edge, in all levels of 8 bits."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
    smooth = 120 * np.exp(-((rows - 0.4) ** 2 + (columns - 0.6) ** 2) * 6) + 100 * columns
    return np.clip(np.rint(smooth + 30 * (rows > 0.7)), 0, 255).astype(np.uint8)


SOURCE = picture()


def square(path: Path, frame: int | None = None, rules: IntakeRules | None = None, channels: int = 1) -> np.ndarray:
    rules = rules or IntakeRules()
    with quiet():
        return Source(path, None, rules).square(frame, Form(32, channels, rules)).astype(int)


@pytest.fixture
def expected(tmp_path: Path, write_dicom: WriteDicom) -> np.ndarray:
    found = square(write_dicom(tmp_path / "reference", SOURCE))
    low, high = np.sort(SOURCE.ravel())[[int(0.005 * SOURCE.size), int(0.995 * SOURCE.size)]].astype(float)
    by_hand = np.clip((SOURCE - low) / (high - low), 0, 1) * 255
    by_hand = by_hand.reshape(32, 2, 32, 2).mean(axis=(1, 3))  # a box: near the Lanczos filter where it is smooth
    assert np.abs(found[0, 2:-2, 2:-2] - by_hand[2:-2, 2:-2]).mean() < 2
    return found


def depths() -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Names, stored values and tags. All are the same but for scale, offset and sign."""
    wide = SOURCE.astype(np.uint16)
    signed = wide.astype(np.int16)
    return {
        "8 unsigned": (SOURCE, {}),
        "8 signed": ((signed - 128).astype(np.int8), {"PixelRepresentation": 1}),
        "8 in 16": (wide, {"BitsStored": 8, "HighBit": 7}),
        "12 unsigned": (wide * 16, {}),
        "12 signed": (signed * 16 - 2048, {"PixelRepresentation": 1}),
        "16 unsigned": (wide * 257, {"BitsStored": 16, "HighBit": 15}),
        "16 signed": (
            (wide.astype(np.int32) * 257 - 32768).astype(np.int16),
            {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15},
        ),
        "rescaled": (wide * 3 + 7, {"RescaleSlope": 2.5, "RescaleIntercept": -1024}),
        "high bit 15": ((wide * 16) << 4, {"HighBit": 15}),
        "overlay above": ((wide * 16) | np.uint16(0xA000), {}),
        "signed, overlay above": (
            ((signed * 16 - 2048) & 0x0FFF).astype(np.uint16) | np.uint16(0x5000),
            {"PixelRepresentation": 1},
        ),
    }


@pytest.mark.parametrize("name", depths())
@pytest.mark.parametrize("inverted", [False, True])
def test_depths_and_both_monochromes_give_one_tensor(
    tmp_path: Path, write_dicom: WriteDicom, expected: np.ndarray, name: str, inverted: bool
) -> None:
    """Exactly; of the inverted one a rounding apart, as its percentiles are taken from the other end."""
    pixels, tags = depths()[name]
    whole = IntakeRules(percentiles=(0, 100))
    reference = square(write_dicom(tmp_path / "whole", SOURCE), rules=whole)
    if inverted:
        ones = np.array(-1).astype(pixels.dtype)  # all bits: ~x is the same picture upside down, signed or not
        flipped = pixels ^ ones
        mono1 = {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}
        path = write_dicom(tmp_path / "a", flipped, **(tags | mono1))
        assert np.abs(square(path, rules=whole) - reference).max() <= 1
        return
    path = write_dicom(tmp_path / "a", pixels, **tags)
    assert np.array_equal(square(path), expected)
    assert np.array_equal(square(path, rules=whole), reference)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_of_both_monochromes_give_one_tensor(tmp_path: Path, write_dicom: WriteDicom, function: str) -> None:
    tags: dict[str, Any] = {"VOILUTFunction": function, "WindowWidth": 120}
    one = square(write_dicom(tmp_path / "a", SOURCE, WindowCenter=100, **tags))
    centre = 255 - 100 + (1 if function == "LINEAR" else 0)  # LINEAR is not symmetric: C.11.2.1.2.1
    mono1 = {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": centre}
    assert np.abs(one - square(write_dicom(tmp_path / "b", 255 - SOURCE, **mono1, **tags))).max() <= 1


def recoded(path: Path, syntax: str, **options: Any) -> Path:
    dataset = dcmread(path)
    dataset.SOPClassUID, dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPClassUID, "1.2.3"
    if syntax == JPEGLosslessSV1:
        return by_gdcm(path, syntax)
    if syntax in (RLELossless, JPEG2000Lossless, JPEG2000, JPEGLSLossless, JPEGLSNearLossless):
        dataset.compress(syntax, generate_instance_uid=False, **options)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian and dataset.BitsAllocated == 16:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    out = path.with_name("recoded")
    implicit = syntax == ImplicitVRLittleEndian
    if syntax == ExplicitVRBigEndian:  # save_as refuses to turn bytes around, which was done above
        dataset["PixelData"].VR = "OB" if dataset.BitsAllocated == 8 else "OW"
        dcmwrite(out, dataset, implicit_vr=False, little_endian=False)
    else:
        dataset.save_as(out, implicit_vr=implicit)
    return out


def by_gdcm(path: Path, syntax: str) -> Path:
    import gdcm

    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    out = path.with_name("recoded")
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(out))
    assert writer.Write()
    assert dcmread(out).file_meta.TransferSyntaxUID == syntax
    return out


LOSSLESS = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLosslessSV1,
)


@pytest.mark.parametrize("name", ["8 unsigned", "12 unsigned", "12 signed", "16 unsigned", "16 signed"])
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_lossless_encodings_give_one_tensor(
    tmp_path: Path, write_dicom: WriteDicom, expected: np.ndarray, syntax: str, name: str
) -> None:
    pixels, tags = depths()[name]
    assert np.array_equal(square(recoded(write_dicom(tmp_path / "a", pixels, **tags), syntax)), expected)


def packed_words(path: Path, syntax: str, change: Callable[[Dataset], None]) -> Path:
    """Pack whole words, in 16 bits: what is beside the stored bits too."""
    dataset = dcmread(path)
    stated = dataset.BitsStored, dataset.HighBit
    dataset.BitsStored, dataset.HighBit = 16, 15
    dataset.save_as(path)
    dataset = dcmread(recoded(path, syntax))
    dataset.BitsStored, dataset.HighBit = stated
    change(dataset)
    dataset.save_as(path)
    return path


WORDS = ("overlay above", "signed, overlay above", "high bit 15", "12 signed", "12 unsigned", "8 in 16")
PACKED = (ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1)


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("syntax", PACKED, ids=lambda syntax: syntax.keyword)
def test_packed_words_give_one_tensor(
    tmp_path: Path, write_dicom: WriteDicom, expected: np.ndarray, syntax: str, name: str
) -> None:
    """A codestream of 16 bits where fewer are stored holds the words of the file as they stand."""
    pixels, tags = depths()[name]
    path = packed_words(write_dicom(tmp_path / "a", pixels, **tags), syntax, lambda _: None)
    assert np.array_equal(square(path), expected)


@pytest.mark.parametrize(
    ("signed", "vr", "value"), [(0, "US", 63536), (0, "SS", -2000), (1, "SS", -32768), (1, "US", 32768)]
)
@pytest.mark.parametrize("syntax", PACKED, ids=lambda syntax: syntax.keyword)
def test_padding_beyond_the_stored_bits_is_kept_by_every_encoding(
    tmp_path: Path, write_dicom: WriteDicom, syntax: str, signed: int, vr: str, value: int
) -> None:
    pixels = SOURCE.astype(np.uint16) * 16
    if signed:
        pixels = (pixels.astype(np.int16) - 2048).astype(np.uint16) & 0x0FFF
    pixels[:16] = value % 2**16
    path = write_dicom(tmp_path / "a", pixels, PixelRepresentation=signed)
    path = packed_words(path, syntax, lambda dataset: dataset.add_new("PixelPaddingValue", vr, value))
    found = Source(path, None, IntakeRules(percentiles=(0, 100))).levels(None)
    low, high = SOURCE[16:].min(), SOURCE[16:].max()
    assert not found[:16].any()
    assert np.allclose(found[16:], (SOURCE[16:] - float(low)) * (255 / (high - low)), atol=1e-3)


@pytest.mark.parametrize(
    ("syntax", "options"),
    [(JPEGLSNearLossless, {"jls_error": 3}), (JPEG2000, {"j2k_cr": [12]})],
    ids=["JPEGLSNearLossless", "JPEG2000"],
)
def test_lossy_white_stays_white(tmp_path: Path, write_dicom: WriteDicom, syntax: str, options: dict[str, Any]) -> None:
    """A codec that rounds, and knows of more bits than are stored, goes beyond the highest value here and there."""
    pixels = SOURCE.astype(np.uint16) * 16 + 15
    pixels[:, 20:40] = 4095
    tags = {"WindowCenter": 2048, "WindowWidth": 4096}
    path = write_dicom(tmp_path / "a", pixels, BitsStored=16, HighBit=15, **tags)
    dataset = dcmread(recoded(path, syntax, **options))
    assert dataset.pixel_array.max() > 4095
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.save_as(path)
    found = Source(path, None, IntakeRules()).levels(None)
    assert np.abs(found - pixels * (255 / 4095)).max() < 10


@pytest.mark.parametrize(
    ("syntax", "options", "most"),
    [(JPEGLSNearLossless, {"jls_error": 1}, 4), (JPEG2000, {"j2k_cr": [5]}, 4)],
    ids=["JPEGLSNearLossless", "JPEG2000"],
)
def test_lossy_encodings_give_almost_one_tensor(
    tmp_path: Path, write_dicom: WriteDicom, expected: np.ndarray, syntax: str, options: dict[str, Any], most: int
) -> None:
    """Within `most` levels of 255 at the worst pixel, one on average."""
    difference = np.abs(square(recoded(write_dicom(tmp_path / "a", SOURCE), syntax, **options)) - expected)
    assert difference.max() <= most
    assert difference.mean() <= 1


def test_jpeg_baseline_gives_almost_one_tensor(tmp_path: Path, write_dicom: WriteDicom, expected: np.ndarray) -> None:
    jpeg = io.BytesIO()
    Image.fromarray(SOURCE).save(jpeg, "JPEG", quality=97)
    path = write_dicom(tmp_path / "a", SOURCE, syntax=JPEGBaseline8Bit, PixelData=encapsulate([jpeg.getvalue()]))
    difference = np.abs(square(path) - expected)
    assert difference.max() <= 5
    assert difference.mean() <= 1


def test_colour_encodings_give_one_tensor(tmp_path: Path, write_dicom: WriteDicom) -> None:
    colour = np.stack([SOURCE, 255 - SOURCE, SOURCE // 2], axis=2)
    one = square(write_dicom(tmp_path / "a", colour), channels=3)
    planes = {"PlanarConfiguration": 1, "PixelData": np.moveaxis(colour, 2, 0).tobytes()}
    assert np.array_equal(square(write_dicom(tmp_path / "b", colour, **planes), channels=3), one)
    for syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless):
        assert np.array_equal(square(recoded(write_dicom(tmp_path / "c", colour), syntax), channels=3), one)


def test_frames_and_containers_give_one_tensor(tmp_path: Path, write_dicom: WriteDicom, expected: np.ndarray) -> None:
    """The picture as middle frame, there with its own window in a functional group, and as a member of an archive."""
    frames = np.stack([np.zeros_like(SOURCE), SOURCE, np.full_like(SOURCE, 9)])
    film = {"NumberOfFrames": 3, "PixelData": frames.tobytes()}
    assert np.array_equal(square(write_dicom(tmp_path / "film", SOURCE, **film), 1), expected)
    groups = [Dataset() for _ in frames]
    for number, group in enumerate(groups):
        rescale, window = Dataset(), Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = number + 1, 0, "US"
        window.WindowCenter, window.WindowWidth = 200, 240
        group.PixelValueTransformationSequence, group.FrameVOILUTSequence = [rescale], [window]
    plain = square(write_dicom(tmp_path / "plain", SOURCE, WindowCenter=100.25, WindowWidth=120.5))
    enhanced = {"PerFrameFunctionalGroupsSequence": groups, "WindowCenter": 1, "WindowWidth": 1}
    path = write_dicom(tmp_path / "enhanced", SOURCE, **film, **enhanced)
    assert np.abs(square(path, 1) - plain).max() <= 1
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "reference", "deep/one")
        archive.write(tmp_path / "film", "film")
    dataset, _ = read(scan(tmp_path / "zipped", "none"), ["all"], 32)
    assert [np.array_equal(image, expected) for image in dataset.images] == [True, True]
