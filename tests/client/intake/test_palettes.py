from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from client.intake.palettes import from_palette
from client.intake.refusals import Reason, Refused
from client.intake.rules import IntakeRules
from client.intake.worker import Source

WriteDicom = Callable[..., Path]
NUMBERS = np.arange(256, dtype=np.uint8).reshape(16, 16)
BYTES = np.random.default_rng(0).integers(0, 256, 256).astype(np.uint8)
"""The colours of entries 0 to 255."""


def palette(data: bytes, entries: int = 256, first: int = 0, bits: int = 8, vr: str = "US") -> Dataset:
    found = Dataset()
    for name in ("Red", "Green", "Blue"):
        found.add_new(f"{name}PaletteColorLookupTableDescriptor", vr, [entries, first, bits])
        found.add_new(f"{name}PaletteColorLookupTableData", "OW", data)
    return found


def levels(write_dicom: WriteDicom, path: Path, pixels: np.ndarray, tables: Dataset, **tags: Any) -> np.ndarray:
    dataset = dcmread(write_dicom(path, pixels, PhotometricInterpretation="PALETTE COLOR", **tags))
    dataset.update(tables)
    dataset.save_as(path)
    found = Source(path, None, IntakeRules()).levels(None)
    assert (found[..., :1] == found).all()  # three tables of one content
    return found[..., 0]


@pytest.mark.parametrize(
    ("bits", "data", "expected"),
    [
        (8, BYTES.tobytes(), BYTES),
        (8, BYTES.astype("<u2").tobytes(), BYTES),
        (16, (BYTES.astype("<u2") * 257).tobytes(), BYTES),
        (16, (BYTES.astype("<u2") * 256).tobytes(), BYTES * (256 / 257)),  # as some write them: no full white
        (16, BYTES.tobytes(), BYTES),  # 16 bits are stated of bytes
    ],
)
def test_bytes_in_words(tmp_path: Path, write_dicom: WriteDicom, bits: int, data: bytes, expected: np.ndarray) -> None:
    """PS3.3 C.7.6.3.1.6: some write entries of 8 bits in 16, which the length of the data tells."""
    found = levels(write_dicom, tmp_path / "a", NUMBERS, palette(data, bits=bits))
    assert np.allclose(found, expected.reshape(16, 16), atol=1e-3)


@pytest.mark.parametrize(
    ("entries", "bits", "data"),
    [
        (256, 8, (BYTES.astype("<u2") * 257).tobytes()),  # more than 8 bits
        (256, 8, BYTES.tobytes()[:-2]),
        (256, 16, BYTES.tobytes() * 4),
        (256, 0, BYTES.tobytes()),
        (256, 32, BYTES.tobytes()),
        (256, 8, b""),
    ],
)
def test_palettes_fit_their_descriptor(
    tmp_path: Path, write_dicom: WriteDicom, entries: int, bits: int, data: bytes
) -> None:
    with pytest.raises(Refused, match=Reason.PIXELS):
        levels(write_dicom, tmp_path / "a", NUMBERS, palette(data, entries, bits=bits))


def test_an_odd_number_of_bytes_is_padded(tmp_path: Path, write_dicom: WriteDicom) -> None:
    found = levels(write_dicom, tmp_path / "a", NUMBERS, palette(BYTES.tobytes(), 255))
    assert np.array_equal(found.ravel(), [*BYTES[:255], BYTES[254]])


def test_more_entries_than_a_byte_counts(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """Of 12 bits into 8; what is beyond the palette takes its last entry."""
    pixels = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    entries = (np.arange(4000) // 16).astype(np.uint8)
    found = levels(write_dicom, tmp_path / "a", pixels, palette(entries.tobytes(), 4000))
    assert np.array_equal(found.ravel(), np.minimum(np.arange(256), 249))


def test_the_first_value_is_the_first_entry(tmp_path: Path, write_dicom: WriteDicom) -> None:
    found = levels(write_dicom, tmp_path / "a", NUMBERS, palette(BYTES[:100].tobytes(), 100, 50))
    assert np.array_equal(found.ravel(), BYTES[np.clip(np.arange(256) - 50, 0, 99)])


@pytest.mark.parametrize(("bits", "kind"), [(8, "<u2"), (8, "u1"), (16, "<u2")])
def test_palettes_in_big_endian(bits: int, kind: str) -> None:
    """PS3.5 7.3 and 8: words are turned around in the file, and of packed bytes the first is the lower half."""
    content = (BYTES.astype("u2") * (257 if bits == 16 else 1)).astype(kind).tobytes()
    dataset = palette(np.frombuffer(content, "<u2").astype(">u2").tobytes(), bits=bits)
    dataset.PixelRepresentation = 0
    dataset.set_original_encoding(False, False)
    assert np.allclose(from_palette(NUMBERS, dataset)[..., 0].ravel(), BYTES, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 16])
def test_segmented_palettes(tmp_path: Path, write_dicom: WriteDicom, bits: int) -> None:
    """PS3.3 C.7.9.2: entries one by one (0), then a line to the last one (1)."""
    kind, scale = ("u1", 1) if bits == 8 else ("<u2", 257)
    segments = np.array([0, 2, 5 * scale, 0, 1, 254, 254 * scale], kind)
    tables = Dataset()
    for name in ("Red", "Green", "Blue"):
        tables.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, bits])
        data = segments.tobytes() + (b"\0" if bits == 8 else b"")
        tables.add_new(f"Segmented{name}PaletteColorLookupTableData", "OW", data)
    if bits == 8:  # seven bytes and one that pads: a second line, of nothing
        for name in ("Red", "Green", "Blue"):
            tables[f"Segmented{name}PaletteColorLookupTableData"].value = bytes([0, 3, 5, 0, 1, 1, 253, 254])
    found = levels(write_dicom, tmp_path / "a", NUMBERS, tables)
    assert np.abs(found.ravel() - [5, *range(255)]).max() <= 1


@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize("segmented", [False, True])
def test_palettes_of_signed_values(tmp_path: Path, write_dicom: WriteDicom, vr: str, segmented: bool) -> None:
    """PS3.3 C.7.6.3.1.5: it is mapped from a stored value, which PixelRepresentation gives its sign."""
    pixels = np.arange(-100, 156, dtype=np.int16).reshape(16, 16)
    tables = palette((np.arange(256, dtype="<u2") * 257).tobytes(), 256, 2**16 - 100 if vr == "US" else -100, 16, vr)
    if segmented:
        for name in ("Red", "Green", "Blue"):
            del tables[f"{name}PaletteColorLookupTableData"]
            line = np.array([0, 1, 0, 1, 255, 65535], "<u2").tobytes()
            tables.add_new(f"Segmented{name}PaletteColorLookupTableData", "OW", line)
    found = levels(write_dicom, tmp_path / "a", pixels, tables, PixelRepresentation=1)
    assert np.abs(found.ravel() - np.arange(256)).max() < 0.51


def test_a_first_value_in_the_upper_half_of_unsigned_values(tmp_path: Path, write_dicom: WriteDicom) -> None:
    pixels = np.arange(40000, 40256, dtype=np.uint16).reshape(16, 16)
    found = levels(write_dicom, tmp_path / "a", pixels, palette(BYTES.tobytes(), 256, 40000), BitsStored=16, HighBit=15)
    assert np.array_equal(found.ravel(), BYTES)


@pytest.mark.parametrize("missing", ["Descriptor", "Data"])
@pytest.mark.parametrize("name", ["Red", "Blue"])
def test_no_palette_is_refused(tmp_path: Path, write_dicom: WriteDicom, missing: str, name: str) -> None:
    tables = palette(BYTES.tobytes())
    if missing == "Descriptor":
        tables.RedPaletteColorLookupTableDescriptor = None if name == "Red" else [256]
    else:
        del tables[f"{name}PaletteColorLookupTableData"]
    with pytest.raises(Refused, match=Reason.PIXELS):
        levels(write_dicom, tmp_path / "a", NUMBERS, tables)
    with pytest.raises(Refused, match=Reason.PIXELS):
        levels(write_dicom, tmp_path / "b", NUMBERS, Dataset())
    with pytest.raises(Refused, match=Reason.PIXELS):  # a supplemental palette is one for a part of the values
        levels(write_dicom, tmp_path / "c", NUMBERS, palette(BYTES.tobytes()), PixelPresentation="MIXED")
