"""The reader of identifiers, beside pydicom and against any bytes."""

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.errors import InvalidDicomError

from client.pull import identifiers
from client.pull.identifiers import Identifiers, NotDicom, read_identifiers

FILES = (
    "CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm",
    "image_dfl.dcm", "JPEG2000.dcm", "liver_1frame.dcm", "rtplan.dcm", "reportsi.dcm", "UN_sequence.dcm",
    "meta_missing_tsyntax.dcm", "nested_priv_SQ.dcm", "no_meta.dcm", "waveform_ecg.dcm",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_as_pydicom_reads(name: str) -> None:
    path = Path(str(get_testdata_file(name, download=False)))
    try:
        expected = dcmread(path, stop_before_pixels=True)
        uids = [str(expected.get(key)) for key in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
    except InvalidDicomError:
        uids = ["None"]
    if "None" in uids or "TransferSyntaxUID" not in expected.file_meta:
        with pytest.raises(NotDicom):
            read_identifiers(path)
    else:
        assert read_identifiers(path) == Identifiers(*uids)


HEAD = bytes(128) + b"DICM"


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value


META = element(0x00020010, b"UI", b"1.2.840.10008.1.2.1\0")
STUDY = element(0x0020000D, b"UI", b"1.2\0")
SERIES = element(0x0020000E, b"UI", b"1.3\0")
INSTANCE = element(0x00080018, b"UI", b"1.4\0")
SEQUENCE = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
ITEM, ITEM_END, END = (
    struct.pack("<HHI", 0xFFFE, low, size) for low, size in ((0xE000, 2**32 - 1), (0xE00D, 0), (0xE0DD, 0))
)


def read(tmp_path: Path, body: bytes) -> Identifiers:
    path = tmp_path / "x.dcm"
    path.write_bytes(HEAD + META + body)
    return read_identifiers(path)


def test_identifiers_inside_a_sequence_are_not_the_files(tmp_path: Path) -> None:
    inside = SEQUENCE + ITEM + element(0x0020000D, b"UI", b"9.9\0") + ITEM_END + END
    assert read(tmp_path, INSTANCE + inside + STUDY + SERIES) == Identifiers("1.2", "1.3", "1.4")


def test_second_identifier_behind_the_first_is_refused(tmp_path: Path) -> None:
    """A reader that takes the last of two would see another study than the one that was checked."""
    for body in (INSTANCE + INSTANCE + STUDY + SERIES, STUDY + INSTANCE + SERIES):
        with pytest.raises(NotDicom):
            read(tmp_path, body)


def test_depth_and_steps_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nested = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + ITEM
    with pytest.raises(NotDicom):
        read(tmp_path, INSTANCE + nested * 100_000)
    monkeypatch.setattr(identifiers, "MAX_ELEMENTS", 50)
    with pytest.raises(NotDicom):
        read(tmp_path, INSTANCE + SEQUENCE + (ITEM + ITEM_END) * 100 + END + STUDY + SERIES)


def test_deflated_is_not_inflated_beyond_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identifiers, "MAX_INFLATED", 1 << 10)
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = INSTANCE + element(0x00080020, b"UT", b"")[:8] + bytes(10_000_000)
    path = tmp_path / "x.dcm"
    meta = element(0x00020010, b"UI", b"1.2.840.10008.1.2.1.99")
    path.write_bytes(HEAD + meta + packer.compress(bomb) + packer.flush())
    with pytest.raises(NotDicom):
        read_identifiers(path)


WHOLE = HEAD + META + INSTANCE + SEQUENCE + ITEM + STUDY + ITEM_END + END + STUDY + SERIES


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(128, len(WHOLE) - 1), st.integers(0, 255)), max_size=6), st.binary(max_size=40))
def test_any_bytes(tmp_path: Path, changes: list[tuple[int, int]], tail: bytes) -> None:
    content = bytearray(WHOLE)
    for at, value in changes:
        content[at] = value
    path = tmp_path / "x.dcm"
    path.write_bytes(bytes(content) + tail)
    try:
        read_identifiers(path)
    except NotDicom:
        pass
