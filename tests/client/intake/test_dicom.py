import logging
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset as DicomDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_voi_lut, convert_color_space
from pydicom.uid import MPEG2MPML, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from client.intake import Reason, scan
from client.intake.dicom import DicomImage
from client.intake.refusals import Refused
from client.intake.rules import IntakeRules
from client.intake.selection import Practice, choose
from client.intake.stages import stages
from client.intake.worker import Source
from common.errors import ConfigError, IntakeError
from tests.client.intake.pictures import read

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
WriteDicom = Callable[..., Path]
WHOLE = IntakeRules(percentiles=(0, 100))


def decode(path: Path, rules: IntakeRules = WHOLE, frame: int | None = None) -> np.ndarray:
    return Source(path, None, rules).levels(frame)


RAMP = np.arange(24 * 16, dtype=np.uint16).reshape(24, 16)


def test_patients_are_grouped_by_issuer_and_id(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "b", PatientID="P1 ", AdmittingDiagnosesDescription="sick")
    write_dicom(tmp_path / "a.dcm", PatientID="P1", IssuerOfPatientID="X", AdmittingDiagnosesDescription="well")
    write_dicom(tmp_path / "deep" / "c.img", PatientID="P1", AdmittingDiagnosesDescription="sick")
    found = scan(tmp_path)
    assert [record.patient for record in found.records] == [("X", "P1"), ("", "P1"), ("", "P1")]
    dataset, refused = read(found, ["sick", "well"], 32)
    assert dataset.patients.tolist() == [0, 0, 1]
    assert dataset.labels.tolist() == [0, 0, 1]
    assert not refused


def test_patients_are_grouped_by_the_qualified_issuer(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """PS3.3 C.7.1.1: two hospitals that number alike may be told apart by the qualifiers of the issuer alone."""
    for name, number, issuer in (
        ("a", "1.2", None),
        ("b", "1.3", None),
        ("c", "1.3", " "),
        ("d", "1.2", "X"),
        ("e", "", None),
    ):
        item = DicomDataset()
        item.UniversalEntityID, item.UniversalEntityIDType = number, "ISO" if number else ""
        tags = {} if issuer is None else {"IssuerOfPatientID": issuer}
        write_dicom(tmp_path / name, IssuerOfPatientIDQualifiersSequence=[item], **tags)
    write_dicom(tmp_path / "f", IssuerOfPatientIDQualifiersSequence=[])
    found = scan(tmp_path, "none")
    assert [record.patient[0] for record in found.records] == ["ISO:1.2", "ISO:1.3", "ISO:1.3", "X", "", ""]
    assert read(found, ["all"], 32)[0].number_of_patients == 4


def test_a_qualified_issuer_that_changed_is_seen_at_decoding(tmp_path: Path, write_dicom: WriteDicom) -> None:
    digests: set[str] = set()
    for number in ("1.2", "1.3", "1.3"):
        item = DicomDataset()
        item.UniversalEntityID = number
        path = write_dicom(tmp_path / "a", SOPInstanceUID="1.9", IssuerOfPatientIDQualifiersSequence=[item])
        found = scan(tmp_path, "none").records[0]
        assert DicomImage(path.read_bytes(), WHOLE).digest == found.seen[1]
        digests.add(found.seen[1])
    assert len(digests) == 2


@pytest.mark.parametrize("keyword", ["PatientID", "IssuerOfPatientID"])
def test_ids_that_cannot_be_decoded_merge_nobody(tmp_path: Path, write_dicom: WriteDicom, keyword: str) -> None:
    """Three ids in Latin-1 that are declared UTF-8 would all read as M\ufffd1."""
    for number, letter in enumerate(("\xfc", "\xf6", "\xe4")):
        path = write_dicom(tmp_path / f"{number}", **{keyword: "MXX1"}, SpecificCharacterSet="ISO_IR 192")
        path.write_bytes(path.read_bytes().replace(b"MXX1", f"M{letter}1 ".encode("latin-1")))
    write_dicom(tmp_path / "3", **{keyword: "M\xfc1"}, SpecificCharacterSet="ISO_IR 192")
    write_dicom(tmp_path / "4", **{keyword: "M\xfc1"}, SpecificCharacterSet="ISO_IR 100")
    found = scan(tmp_path, "none")
    choice = choose(found, Practice(tmp_path, "none"), None)
    assert [record.path.name for record in choice.records] == ["3", "4"]
    assert [refusal.reason for refusal in choice.refusals] == [Reason.PATIENT_UNREADABLE] * 3
    assert len({record.patient for record in choice.records}) == 1


def test_without_a_window_the_full_range_of_the_image(tmp_path: Path, write_dicom: WriteDicom) -> None:
    grey = decode(write_dicom(tmp_path / "a", RAMP + 100, RescaleSlope=2, RescaleIntercept=-5))
    assert np.allclose(grey, RAMP * (255 / RAMP.max()), atol=1e-3)


@pytest.mark.parametrize("width", [0, -3])
def test_a_window_without_width_is_no_window(tmp_path: Path, write_dicom: WriteDicom, width: float) -> None:
    grey = decode(write_dicom(tmp_path / "a", RAMP, WindowCenter=10, WindowWidth=width))
    assert np.allclose(grey, RAMP * (255 / RAMP.max()), atol=1e-3)


def test_window_after_rescale(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """PS3.3 C.11.2.1.2.1 by hand: centre 200, width 101 maps 149.5..249.5 to 0..1."""
    tags = {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": [200, 7], "WindowWidth": [101, 9]}
    grey = decode(write_dicom(tmp_path / "a", RAMP, **tags))
    assert np.allclose(grey, np.clip((RAMP * 2.0 - 100 - 149.5) / 100, 0, 1) * 255, atol=1e-3)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_agree_with_pydicom(tmp_path: Path, write_dicom: WriteDicom, function: str) -> None:
    tags = {"WindowCenter": 190, "WindowWidth": 120, "VOILUTFunction": function}
    path = write_dicom(tmp_path / "a", RAMP, **tags)
    dataset = dcmread(path)
    assert np.allclose(decode(path), apply_voi_lut(dataset.pixel_array, dataset) * (255 / 4095), atol=1e-3)


def test_monochrome1_is_inverted_last_and_once(tmp_path: Path, write_dicom: WriteDicom) -> None:
    tags = {"WindowCenter": 100, "WindowWidth": 101}
    light = decode(write_dicom(tmp_path / "a", RAMP, **tags))
    dark = decode(
        write_dicom(
            tmp_path / "b", RAMP, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE", **tags
        )
    )
    assert np.allclose(light + dark, 255)


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_lookup_tables(tmp_path: Path, write_dicom: WriteDicom, sequence: str) -> None:
    """Values outside the table take its ends; 8-bit entries with 12-bit values do not wrap around."""
    item = DicomDataset()
    item.LUTDescriptor, item.LUTData = [100, 50, 8], list(range(0, 200, 2))
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "US"
    grey = decode(write_dicom(tmp_path / "a", RAMP, **{sequence: [item]}))
    expected = np.clip(RAMP.astype(float) - 50, 0, 99) * 2
    assert np.allclose(grey, expected if sequence == "VOILUTSequence" else expected * (255 / 198), atol=1e-3)


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize("lowest", [-400, 0])
def test_lookup_tables_of_signed_values(
    tmp_path: Path, write_dicom: WriteDicom, sequence: str, vr: str, lowest: int
) -> None:
    """PS3.3 C.11.2.1.1: their first value has the sign of the values, whether or not a pixel is below zero."""
    item = DicomDataset()
    item.add_new("LUTDescriptor", vr, [1024, 2**16 - 512 if vr == "US" else -512, 10])
    item.add_new("LUTData", "OW", np.arange(1024, dtype="<u2").tobytes())
    values = RAMP.astype(np.int16) + lowest
    grey = decode(write_dicom(tmp_path / "a", values, PixelRepresentation=1, **{sequence: [item]}))
    expected = (values + 512) * (255 / 1023) if sequence == "VOILUTSequence" else RAMP * (255 / RAMP.max())
    assert np.allclose(grey, expected, atol=1e-3)


def test_a_table_after_a_rescale_below_zero(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """Of unsigned pixels too, such as CT: what the table is given may be below zero."""
    item = DicomDataset()
    item.add_new("LUTDescriptor", "US", [1024, 2**16 - 512, 10])
    item.add_new("LUTData", "OW", np.arange(1024, dtype="<u2").tobytes())
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -100, "VOILUTSequence": [item]}
    grey = decode(write_dicom(tmp_path / "a", RAMP + 100, **rescale))
    assert np.allclose(grey, (RAMP + 512) * (255 / 1023), atol=1e-3)


def test_a_first_value_in_the_upper_half_of_unsigned_values(tmp_path: Path, write_dicom: WriteDicom) -> None:
    item = DicomDataset()
    item.add_new("LUTDescriptor", "US", [1024, 40000, 10])
    item.add_new("LUTData", "OW", np.arange(1024, dtype="<u2").tobytes())
    tags = {"BitsStored": 16, "HighBit": 15, "VOILUTSequence": [item]}
    grey = decode(write_dicom(tmp_path / "a", RAMP + np.uint16(40000), **tags))
    assert np.allclose(grey, RAMP * (255 / 1023), atol=1e-3)


def test_a_rescale_that_makes_all_values_one_is_refused(tmp_path: Path, write_dicom: WriteDicom) -> None:
    with pytest.raises(Refused, match="header not readable"):
        decode(write_dicom(tmp_path / "a", RAMP, RescaleSlope=0, RescaleIntercept=5))
    item = DicomDataset()  # a modality LUT takes its place
    item.LUTDescriptor, item.LUTData = [384, 0, 16], RAMP.tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    decode(write_dicom(tmp_path / "b", RAMP, RescaleSlope=0, RescaleIntercept=5, ModalityLUTSequence=[item]))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_colours_of_other_stored_bits(tmp_path: Path, write_dicom: WriteDicom, syntax: str) -> None:
    """Twelve bits at the top of sixteen are the same colours; below zero there are none."""
    colours = np.random.default_rng(2).integers(0, 4096, (24, 16, 3)).astype(np.uint16)

    def packed(pixels: np.ndarray, **tags: Any) -> np.ndarray:
        dataset = dcmread(write_dicom(tmp_path / "a", pixels, BitsStored=16, HighBit=15))
        if syntax == RLELossless:
            dataset.compress(RLELossless)
        for keyword, value in ({"BitsStored": 12, "HighBit": 11} | tags).items():
            setattr(dataset, keyword, value)
        dataset.save_as(tmp_path / "a")
        return decode(tmp_path / "a")

    assert np.allclose(packed(colours), colours * (255 / 4095), atol=1e-3)
    assert np.allclose(packed(colours << 4 | 5, HighBit=15), colours * (255 / 4095), atol=1e-3)
    with pytest.raises(Refused, match="pixels not decodable"):
        packed(colours.astype(np.int16), PixelRepresentation=1)


COLOURS = np.random.default_rng(0).integers(40, 210, (28, 28, 3)).astype(np.uint8)


def as_palette(name: str, table: Any) -> dict[str, Any]:
    return {
        f"{name}PaletteColorLookupTableDescriptor": [256, 0, 8],
        f"{name}PaletteColorLookupTableData": bytes(table),
    }


WORDS = (np.arange(256) * 257).astype("<u2")
BYTES = np.arange(256).astype(np.uint8)


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize(
    ("entries", "bits", "data", "fits"),
    [
        (256, 16, WORDS.tobytes(), True),
        (256, 8, BYTES.astype("<u2").tobytes(), True),
        (256, 8, BYTES.tobytes(), True),  # packed, two in a word
        (255, 8, BYTES.tobytes(), True),  # the last byte pads
        (256, 8, BYTES.tobytes()[:-2], False),
        (256, 16, WORDS.tobytes()[:32], False),
        (256, 16, WORDS.tobytes() * 2, False),
        (256, 16, BYTES.tobytes(), False),
        (256, 16, b"", False),
        (256, 8, WORDS.tobytes(), False),  # more than 8 bits
        (256, 0, bytes(512), False),
        (256, 17, WORDS.tobytes(), False),
    ],
)
def test_lookup_tables_fit_their_descriptor(
    tmp_path: Path, write_dicom: WriteDicom, sequence: str, entries: int, bits: int, data: bytes, fits: bool
) -> None:
    item = DicomDataset()
    item.add_new("LUTDescriptor", "US", [entries, 0, bits])
    item.add_new("LUTData", "OW", data)
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 4, (8, 1))
    path = write_dicom(tmp_path / "a", ramp, **{sequence: [item]})
    if fits:
        expected = ramp * (255 / 255 if sequence == "VOILUTSequence" else 255 / 252)
        assert np.allclose(decode(path), expected, atol=1e-3)
    else:
        with pytest.raises(Refused, match="pixels not decodable"):
            decode(path)


def test_a_packed_table_in_big_endian(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """PS3.5 7.3 and 8: the first of two bytes is the lower half of a word, wherever it stands in the file."""
    item = DicomDataset()
    item.add_new("LUTDescriptor", "US", [256, 0, 8])
    item.add_new("LUTData", "OW", BYTES.tobytes())
    path = write_dicom(tmp_path / "a", VOILUTSequence=[item])
    dataset = dcmread(path)
    table = dataset.VOILUTSequence[0]
    table.LUTData = BYTES.reshape(-1, 2)[:, ::-1].tobytes()
    dataset.set_original_encoding(False, False)
    assert stages(dataset, 0, WHOLE).view.entries.tolist() == list(range(256))


def test_colours_are_read(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """RGB as it is and in planes, YBR in 8 bits, 16 bits as a part of what they can hold."""
    planes = {"PlanarConfiguration": 1, "PixelData": np.moveaxis(COLOURS, 2, 0).tobytes()}
    ybr = convert_color_space(COLOURS, "RGB", "YBR_FULL")
    found = [
        decode(write_dicom(tmp_path / "a", COLOURS)),
        decode(write_dicom(tmp_path / "b", COLOURS, **planes)),
        decode(write_dicom(tmp_path / "c", ybr, PhotometricInterpretation="YBR_FULL")),
        decode(write_dicom(tmp_path / "d", COLOURS.astype(np.uint16) * 16)),
    ]
    for levels, off in zip(found, (0, 0, 2.5, 1), strict=True):
        assert levels.shape == (28, 28, 3)
        assert np.abs(levels - COLOURS).max() <= off


def test_colour_becomes_what_is_asked(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "a", COLOURS)
    write_dicom(tmp_path / "b", RAMP)
    grey, _ = read(scan(tmp_path, "none"), ["all"], 28)
    colour, _ = read(scan(tmp_path, "none"), ["all"], 28, 3)
    assert (grey.images.shape, colour.images.shape) == ((2, 1, 28, 28), (2, 3, 28, 28))
    assert np.abs(grey.images[0, 0] - COLOURS @ [0.299, 0.587, 0.114]).max() <= 0.51
    assert np.array_equal(colour.images[0], np.moveaxis(COLOURS, 2, 0))
    assert np.array_equal(colour.images[1], np.repeat(grey.images[1], 3, axis=0))


def test_a_palette_gives_colours(tmp_path: Path, write_dicom: WriteDicom) -> None:
    numbers = np.arange(28 * 28, dtype=np.uint16).reshape(28, 28).astype(np.uint8)
    tables = as_palette("Red", range(256)) | as_palette("Green", range(255, -1, -1)) | as_palette("Blue", [9] * 256)
    path = write_dicom(tmp_path / "a", numbers, PhotometricInterpretation="PALETTE COLOR", **tables)
    assert np.array_equal(decode(path), np.stack([numbers, 255 - numbers, np.full_like(numbers, 9)], axis=2))


@pytest.mark.parametrize(("space", "deep"), [("HSV", False), ("YBR_PARTIAL_420", False), ("YBR_FULL", True)])
def test_colours_that_nobody_converts_are_refused(
    tmp_path: Path, write_dicom: WriteDicom, space: str, deep: bool
) -> None:
    pixels = COLOURS.astype(np.uint16) if deep else COLOURS
    with pytest.raises(Refused, match=Reason.PIXELS):
        decode(write_dicom(tmp_path / "a", pixels, PhotometricInterpretation=space))


@pytest.mark.slow
def test_compressed_colours_are_decoded_outside(tmp_path: Path, write_dicom: WriteDicom) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    path = write_dicom(tmp_path / "a", pixels)
    dataset = dcmread(path)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    dataset.save_as(path)
    colour, _ = read(scan(tmp_path, "none"), ["all"], 64, 3)
    assert np.array_equal(colour.images[0], np.moveaxis(pixels, 2, 0))


def test_a_palette_for_colours_is_refused(tmp_path: Path, write_dicom: WriteDicom) -> None:
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        tags |= as_palette(colour, range(256))
    grey = decode(write_dicom(tmp_path / "a", RAMP.astype(np.uint8), **tags))
    assert np.array_equal(grey, np.repeat(RAMP[..., None] % 256, 3, axis=2))
    with pytest.raises(Refused, match=Reason.PIXELS):
        decode(write_dicom(tmp_path / "b", np.zeros((4, 6, 3), dtype=np.uint8), **tags))


def test_every_unusable_file_is_counted(tmp_path: Path, write_dicom: WriteDicom) -> None:
    def add(name: str, **tags: Any) -> Path:
        return write_dicom(tmp_path / name, AdmittingDiagnosesDescription="x", **tags)

    whole = add("good").read_bytes()
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise").write_bytes(b"\0" * 128 + b"DICM" + np.random.default_rng(0).bytes(4000))
    (tmp_path / "cut").write_bytes(whole[:-100])
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    add("no patient", PatientID=None)
    add("blank patient", PatientID=" ")
    add("film", NumberOfFrames=100_000)
    add("mask", SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")
    (tmp_path / "bare").write_bytes(whole[132:])
    (tmp_path / "no syntax").write_bytes(whole.replace(b"\x02\0\x10\0", b"\x02\0\x11\0"))
    add("report", Rows=None)
    add("no pixels", PixelData=None)
    add("odd bits", BitsAllocated=12)
    add("huge", Rows=60_000, Columns=60_000)
    add("not a number", RescaleSlope="1e308", RescaleIntercept="0")
    write_dicom(tmp_path / "no label", PatientID="P2")
    dataset, refused = read(scan(tmp_path), ["x"], 28)
    assert len(dataset.images) == 1
    assert refused == {
        Reason.NOT_DICOM: 2,
        Reason.NO_IMAGE: 2,
        Reason.PIXELS: 1,
        Reason.NOT_A_FILE: 3,
        Reason.NO_PATIENT: 2,
        Reason.TOO_MANY_FRAMES: 1,
        Reason.NO_PICTURE: 1,
        Reason.NO_PREAMBLE: 1,
        Reason.NO_SYNTAX: 2,
        Reason.HEADER: 1,
        Reason.TOO_LARGE: 1,
        Reason.NOT_FINITE: 1,
        Reason.NO_LABEL: 1,
    }


def test_missing_decoders_are_named(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "good")
    write_dicom(tmp_path / "private", syntax="1.2.3.4.5.6")
    write_dicom(tmp_path / "video", syntax=MPEG2MPML, PixelData=encapsulate([bytes(10)]))
    _, refused = read(scan(tmp_path, "none"), ["all"], 28)
    assert refused == {
        f"{Reason.NO_DECODER} an unregistered transfer syntax": 1,
        f"{Reason.NO_DECODER} {MPEG2MPML.name}": 1,
    }


def test_inflates_within_the_limit(tmp_path: Path, write_dicom: WriteDicom) -> None:
    small = IntakeRules(max_file_mb=1, percentiles=(0, 100))
    plain = decode(write_dicom(tmp_path / "plain"))
    path = write_dicom(tmp_path / "good", syntax="1.2.840.10008.1.2.1.99")
    assert np.array_equal(decode(path, small), plain)
    start = path.read_bytes().index(b"1.2.840.10008.1.2.1.99") + 22
    (tmp_path / "bomb").write_bytes(path.read_bytes()[:start] + packer_of(bytes(2**21)))
    assert scan(tmp_path, "none", small).refused == {Reason.TOO_LARGE: 1}
    with pytest.raises(Refused, match="limits"):
        decode(tmp_path / "bomb", small)


def packer_of(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush()


def test_compressed_single_frame(tmp_path: Path, write_dicom: WriteDicom) -> None:
    path = write_dicom(tmp_path / "a", RAMP)
    before = decode(path)
    dataset = dcmread(path)
    dataset.SOPInstanceUID = "1.2.3"
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.save_as(path)
    assert np.array_equal(decode(path), before)


def test_labels(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "a", Modality="CR", AdmittingDiagnosesDescription=["one", "two"], SeriesNumber=4)
    write_dicom(tmp_path / "deep" / "b", Modality="DX")
    assert [record.label for record in scan(tmp_path).records] == ["one\\two", None]
    assert [record.label for record in scan(tmp_path, "tag:Modality").records] == ["CR", "DX"]
    assert [record.label for record in scan(tmp_path, "tag:SeriesNumber").records] == ["4", None]
    assert [record.label for record in scan(tmp_path, "none").records] == ["all", "all"]
    with pytest.raises(ConfigError, match="keyword"):
        scan(tmp_path, "tag:Modalitty")
    with pytest.raises(IntakeError, match=r"labels\.csv"):
        scan(tmp_path, "column:finding")
    with pytest.raises(IntakeError, match="--label none"):
        scan(tmp_path, "tag:StudyDescription")


def test_labels_file(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "a", Modality="CR")
    write_dicom(tmp_path / "deep" / "b", Modality="DX")
    (tmp_path / "labels.csv").write_text("File,Label,Finding,Site\n./a,0,ill,north\ndeep/b,,well,south\n")
    (tmp_path / "notes.csv").write_text("more\n")
    found = scan(tmp_path)
    assert [(record.label, record.site) for record in found.records] == [("0", "north"), (None, "south")]
    assert [record.label for record in scan(tmp_path, "column:Finding").records] == ["ill", "well"]
    assert [record.label for record in scan(tmp_path, "tag:Modality").records] == ["CR", "DX"]
    assert [record.site for record in scan(tmp_path, "none").records] == ["north", "south"]
    (tmp_path / "labels.csv").write_text("file,label\na,0\n./a,1\n")
    with pytest.raises(IntakeError, match="more than once"):
        scan(tmp_path)


def test_no_patient_at_all_is_explained(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "a", PatientID=None)
    with pytest.raises(IntakeError, match="No image names its patient"):
        scan(tmp_path, "none")


def test_nothing_of_a_file_is_shown(tmp_path: Path, write_dicom: WriteDicom, caplog: pytest.LogCaptureFixture) -> None:
    """pydicom quotes odd values in warnings and log lines; here they are neither raised nor logged."""
    path = write_dicom(tmp_path / "a", PatientID="SECRET")
    path.write_bytes(path.read_bytes().replace(b"MONOCHROME2", b"SECRET\xff\xfe567"))
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(IntakeError) as error:
            read(scan(tmp_path, "none"), ["all"], 28)
    shown = [
        str(error.value),
        *(str(item.message) for item in seen),
        *(record.getMessage() for record in caplog.records),
    ]
    assert not [text for text in shown if "SECRET" in text]


@pytest.fixture(scope="module")
def dicom_bytes(tmp_path_factory: pytest.TempPathFactory, write_dicom: WriteDicom) -> bytes:
    tags = {"WindowCenter": 100, "WindowWidth": 50, "RescaleSlope": 2, "RescaleIntercept": 1, "NumberOfFrames": 1}
    return write_dicom(tmp_path_factory.mktemp("dicom") / "a", **tags).read_bytes()


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.data())
def test_mutated_bytes_are_counted(dicom_bytes: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a").write_bytes(dicom_bytes)
        mutated = bytearray(dicom_bytes)
        for _ in range(data.draw(st.integers(1, 8))):
            mutated[data.draw(st.integers(132, 700))] = data.draw(st.integers(0, 255))
        end = data.draw(st.one_of(st.just(len(mutated)), st.integers(0, len(mutated))))
        (folder / "b").write_bytes(mutated[:end])
        dataset, refused = read(scan(folder, "none"), ["all"], 28)
        assert len(dataset.images) + sum(refused.values()) == 2


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.binary(max_size=400))
@example(b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0")
def test_random_bytes_after_the_preamble_are_counted(dicom_bytes: bytes, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a").write_bytes(dicom_bytes)
        (folder / "b").write_bytes(b"\0" * 128 + b"DICM" + content)
        dataset, refused = read(scan(folder, "none"), ["all"], 28)
        assert len(dataset.images) + sum(refused.values()) == 2


@pytest.mark.skipif(not SHARED.exists(), reason="the shared test data are not on this machine")
def test_real_ct_series() -> None:
    dataset, refused = read(scan(SHARED / "dicom_covid_ny_sbu", "none"), ["all"], 32)
    assert (len(dataset.images), dataset.number_of_patients) == (24, 5)
    assert refused == {Reason.NOT_DICOM: 1}


def test_frame_groups_win(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """The frame's own group wins over the shared one, and this over the top level; rescale and window apart."""
    own, shared = DicomDataset(), DicomDataset()
    own.PixelValueTransformationSequence, shared.FrameVOILUTSequence = [DicomDataset()], [DicomDataset()]
    own.PixelValueTransformationSequence[0].RescaleSlope = 2
    own.PixelValueTransformationSequence[0].RescaleIntercept = 10
    shared.FrameVOILUTSequence[0].WindowCenter, shared.FrameVOILUTSequence[0].WindowWidth = 200, 101
    tags = {"NumberOfFrames": 2, "PixelData": RAMP.tobytes() * 2, "WindowCenter": 1, "WindowWidth": 2}
    groups = {"PerFrameFunctionalGroupsSequence": [DicomDataset(), own], "SharedFunctionalGroupsSequence": [shared]}
    path = write_dicom(tmp_path / "a", RAMP, RescaleSlope=3, RescaleIntercept=0, **tags, **groups)
    for frame, (slope, intercept) in enumerate([(3, 0), (2, 10)]):
        expected = np.clip((RAMP * float(slope) + intercept - 149.5) / 100, 0, 1) * 255
        assert np.allclose(decode(path, frame=frame), expected, atol=1e-3)


def test_high_bits_are_cleared(tmp_path: Path, write_dicom: WriteDicom) -> None:
    tags = {"WindowCenter": 200, "WindowWidth": 300}
    plain = decode(write_dicom(tmp_path / "a", RAMP, **tags))
    assert np.array_equal(decode(write_dicom(tmp_path / "b", RAMP | np.uint16(0x7000), **tags)), plain)
    below_zero = (RAMP.astype(np.int16) - 300).astype(np.uint16) & 0x0FFF | np.uint16(0x5000)
    signed = {"PixelRepresentation": 1, "WindowCenter": -100, "WindowWidth": 300}
    assert np.array_equal(decode(write_dicom(tmp_path / "c", below_zero, **signed)), plain)


def test_padding_is_a_value_or_a_range(tmp_path: Path, write_dicom: WriteDicom) -> None:
    for number, (tags, low) in enumerate([({}, 6), ({"PixelPaddingRangeLimit": 9}, 10)]):
        pixels = np.maximum(RAMP, 5)
        grey = decode(write_dicom(tmp_path / str(number), pixels, PixelPaddingValue=5, **tags))
        assert not grey[pixels < low].any()
        assert grey[pixels == low] == 0  # the lowest value that is an image
        assert np.isclose(grey[pixels == low + 1], 255 / (RAMP.max() - low), atol=1e-3)


@pytest.mark.parametrize(
    ("signed", "vr", "value", "limit"),
    [
        (1, "SS", -32768, None),  # would be 0 in 12 bits
        (1, "US", 32768, None),
        (0, "US", 61640, None),  # would be 200
        (0, "SS", -3896, None),
        (0, "US", 61500, 61700),
        (1, "SS", -32768, -30000),
    ],
)
def test_padding_beyond_the_stored_bits_is_no_pixel(
    tmp_path: Path, write_dicom: WriteDicom, signed: int, vr: str, value: int, limit: int | None
) -> None:
    """Such a value takes no pixel away; where a word of the file is that value as it stands, it is padding."""
    tags: dict[str, Any] = {"PixelRepresentation": signed, "WindowCenter": 100, "WindowWidth": 400}
    plain = decode(write_dicom(tmp_path / "a", RAMP, **tags))

    def padded(pixels: np.ndarray) -> np.ndarray:
        dataset = dcmread(write_dicom(tmp_path / "b", pixels, **tags))
        dataset.add_new("PixelPaddingValue", vr, value)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", vr, limit)
        dataset.save_as(tmp_path / "b")
        return decode(tmp_path / "b")

    assert np.array_equal(padded(RAMP), plain)
    words = RAMP.copy()
    words[5] = value % 2**16
    plain[5] = 0
    assert np.array_equal(padded(words), plain)


@pytest.mark.parametrize(
    ("wide", "signed", "vr", "value", "hit"),
    [
        (True, 1, "SL", -(2**31), -(2**31)),
        (True, 1, "UL", 2**31, -(2**31)),  # without its sign
        (True, 0, "UL", 2**32 - 1, 2**32 - 1),
        (True, 0, "SL", -1, 2**32 - 1),
        (True, 1, "SL", 2**20, 2**20),
        (False, 0, "UL", 2**20, None),
        (False, 1, "SL", -(2**31), None),
        (False, 1, "SL", -2000, -2000),
        (False, 1, "UL", 63536, -2000),
    ],
)
def test_padding_of_32_bits(
    tmp_path: Path, write_dicom: WriteDicom, wide: bool, signed: int, vr: str, value: int, hit: int | None
) -> None:
    """A longer value is one of 16 bits only where it fits these: -2147483648 takes no 0 away."""
    bits = 32 if wide else 16
    pixels = RAMP.astype(f"{'i' if signed else 'u'}{bits // 8}")
    if hit is not None:
        pixels[5] = hit
    tags = {"BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": signed}
    path = write_dicom(tmp_path / "a", pixels, WindowCenter=100, WindowWidth=400, **tags)
    dataset = dcmread(path)
    dataset.add_new("PixelPaddingValue", vr, value)
    dataset.save_as(path)
    expected = decode(write_dicom(tmp_path / "b", RAMP, WindowCenter=100, WindowWidth=400))
    if hit is not None:
        expected[5] = 0
    assert expected[0, 0] > 0
    assert np.array_equal(decode(path), expected)


def test_padding_in_words_with_other_bits(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """What stands beside the stored bits, such as an overlay, does not hide padding."""
    words = RAMP | np.uint16(0x7000)
    assert np.array_equal(
        decode(write_dicom(tmp_path / "a", words, PixelPaddingValue=300)),
        decode(write_dicom(tmp_path / "b", RAMP, PixelPaddingValue=300)),
    )


def test_windows_by_rule(tmp_path: Path, write_dicom: WriteDicom) -> None:
    several = {"WindowCenter": [100, 200], "WindowWidth": [101, 51]}
    path = write_dicom(tmp_path / "a", RAMP, **several)
    for number, one in ((0, (100, 101)), (1, (200, 51)), (7, (200, 51))):
        single = decode(write_dicom(tmp_path / "b", RAMP, WindowCenter=one[0], WindowWidth=one[1]))
        assert np.array_equal(decode(path, IntakeRules(window=number)), single)
    none = IntakeRules(window="percentile", percentiles=(0, 100))
    assert np.array_equal(decode(path, none), decode(write_dicom(tmp_path / "c", RAMP)))


def test_ct_by_hounsfield_presets(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """CT with a rescale to Hounsfield units alone; other modalities, and CT in other units, as they state."""
    rules = IntakeRules(ct_window="brain", percentiles=(0, 100))
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -100}
    expected = np.clip((RAMP - 100.0 - 39.5) / 79 + 0.5, 0, 1) * 255
    assert np.allclose(decode(write_dicom(tmp_path / "a", RAMP, Modality="CT", **rescale), rules), expected, atol=1e-3)
    whole = decode(write_dicom(tmp_path / "b", RAMP))
    for tags in ({"Modality": "MR", **rescale}, {"Modality": "CT"}, {"Modality": "CT", "RescaleType": "US", **rescale}):
        assert np.allclose(decode(write_dicom(tmp_path / "c", RAMP, **tags), rules), whole, atol=1e-3)


@pytest.mark.parametrize(("name", "kind"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
def test_float_pixels_are_read(tmp_path: Path, write_dicom: WriteDicom, name: str, kind: str) -> None:
    values = RAMP.astype(kind) / 7 - 3
    tags = {"PixelData": None, "BitsStored": None, "HighBit": None, "PixelRepresentation": None}
    floats: dict[str, Any] = {name: values.tobytes(), "BitsAllocated": values.itemsize * 8, **tags}
    whole = decode(write_dicom(tmp_path / "b", RAMP))
    assert np.allclose(decode(write_dicom(tmp_path / "a", RAMP, **floats)), whole, atol=1e-3)
    values[3, 3] = np.nan
    with pytest.raises(Refused, match="finite"):
        decode(write_dicom(tmp_path / "c", RAMP, **(floats | {name: values.tobytes()})))


def test_frames_by_rule(tmp_path: Path, write_dicom: WriteDicom) -> None:
    stack = np.stack([np.full((8, 8), 40 * number, np.uint8) for number in range(5)])
    write_dicom(
        tmp_path / "a", stack[0], NumberOfFrames=5, PixelData=stack.tobytes(), WindowCenter=128, WindowWidth=256
    )
    for rules, frames in (
        (IntakeRules(), [2]),
        (IntakeRules(frames="all"), [0, 1, 2, 3, 4]),
        (IntakeRules(frames=2), [0, 2, 4]),
    ):
        found = scan(tmp_path, "none", rules)
        assert [record.frame for record in found.records] == frames
        images = read(found, ["all"], 28, rules=rules)[0].images
        assert images[:, 0, 9, 9].tolist() == [40 * frame for frame in frames]
