"""A folder of DICOM files, single-frame. Out of scope: multi-frame, deflated data sets, PACS, de-identification.

From stored values to grey levels, image by image: modality LUT or rescale, then the first VOI LUT or window, else the
image's own full range; MONOCHROME1 is inverted last and once. Colours (RGB, YBR, a palette) become red, green and blue,
from none to full; windows are for grey images.

Source: DICOM PS3.3 C.11.1 (modality LUT), C.11.2 (VOI LUT), C.7.6.3.1.2 (photometric interpretation).
"""

import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float64, Num
from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, JPEGExtended12Bit, RLELossless, UID_dictionary

from client.intake.pixels import MAX_FILE_BYTES, Grey, Levels, check_size, full_range
from client.intake.records import ALL, LabelSource, Record, Scan
from client.intake.refusals import Reason, Refused
from client.intake.table import Row, read_table
from common.errors import ConfigError, IntakeError

LABELS_FILE = "labels.csv"
AUTO_TAG = "AdmittingDiagnosesDescription"

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
"""What pydicom hands over as red, green and blue, as its decoders or itself convert it."""

_HEADER = ["PatientID", "IssuerOfPatientID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated"]

# What pydicom, its decoders and NumPy raise for damaged files, found by the fuzz test and by reading pydicom:
# lengths beyond the file (EOFError, struct.error, MemoryError), values of a wrong type (TypeError, AttributeError,
# ValueError, ArithmeticError), unknown VRs (NotImplementedError, a RuntimeError), nesting (RecursionError, also one).
_DAMAGED = (
    InvalidDicomError,
    BytesLengthException,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)


def scan_folder(folder: Path, label: LabelSource) -> Scan:
    """List the images of all DICOM files below a folder, from their headers.

    Raises:
        IntakeError: `labels.csv` is needed and missing, or cannot be read.
        ConfigError: The label's tag is not a DICOM keyword.
    """
    table, column = _labels_file(folder, label)
    keyword = label.name if label.kind == "tag" else AUTO_TAG
    if tag_for_keyword(keyword) is None:
        raise ConfigError(f"Expected a DICOM keyword such as {AUTO_TAG} in --label tag:KEYWORD, got {keyword!r}.")
    records: list[Record] = []
    refused = Counter[str]()
    for path in _walk(folder, refused):
        try:
            patient, diagnosis = _header(path, keyword)
        except Refused as refusal:
            refused[refusal.reason] += 1
            continue
        row = table.get(path.relative_to(folder).as_posix(), {})
        text = ALL if label.kind == "none" else row.get(column) if column else diagnosis
        records.append(Record(path, None, patient, text or None, row.get("site") or None))
    return Scan(tuple(records), {reason: count for reason, count in refused.items() if count})


def is_dicom(path: Path) -> bool:
    """Return whether a file has the DICOM preamble.

    Source: DICOM PS3.10 7.1.
    """
    with path.open("rb") as handle:
        return handle.read(132)[128:] == b"DICM"


def is_compressed(path: Path) -> bool:
    """Return whether a file's pixels need a compiled decoder, which is not trusted with this process."""
    try:
        syntax = read_file_meta_info(path).get("TransferSyntaxUID")
        return isinstance(syntax, UID) and syntax.is_compressed and syntax != RLELossless
    except _DAMAGED:  # `decode` will say what is wrong, or not a transfer syntax: it will find no decoder
        return False


def decode(path: Path) -> Levels:
    """Read the image of one DICOM file as grey or colour levels.

    Raises:
        Refused: Damaged, too large, without an image, of several frames, or without its decoder.
    """
    try:
        _check_file(path)
        with path.open("rb") as handle:
            # In memory, a length that the header makes up cannot allocate more than the file has.
            dataset = dcmread(io.BytesIO(handle.read(MAX_FILE_BYTES + 1)))
        _check_header(dataset)
        if "PixelData" not in dataset:
            raise Refused(Reason.NO_IMAGE)
        _check_decoder(dataset)
        levels = _present(pixel_array(dataset), dataset)
    except _DAMAGED as error:
        raise Refused(Reason.PIXELS) from error
    if levels.ndim != 2 and levels.shape[2:] != (3,):  # such as a palette for pixels that are colours already
        raise Refused(Reason.PIXELS)
    return levels


def _walk(folder: Path, refused: Counter[str]) -> Iterator[Path]:
    """Yield every regular file in a fixed order; count what is no file and what cannot be entered."""
    unreadable: list[OSError] = []
    for root, folders, names in os.walk(folder, onerror=unreadable.append):
        folders.sort()
        refused[Reason.NOT_A_FILE] += sum((Path(root) / name).is_symlink() for name in folders)
        for name in sorted(names):
            path = Path(root) / name
            if path.is_file():
                if path != folder / LABELS_FILE:
                    yield path
            else:
                refused[Reason.NOT_A_FILE] += 1
    refused[Reason.FOLDER] += len(unreadable)


def _header(path: Path, keyword: str) -> tuple[tuple[str, str], str]:
    """Return (issuer, id) and the value of the tag `keyword`."""
    try:
        _check_file(path)
        header = dcmread(path, stop_before_pixels=True, specific_tags=[*_HEADER, keyword])
        _check_header(header)
        patient = (_text(header.get("IssuerOfPatientID")), _text(header.get("PatientID")))
        diagnosis = _text(header.get(keyword))
    except _DAMAGED as error:
        raise Refused(Reason.HEADER) from error
    if not patient[1]:
        raise Refused(Reason.NO_PATIENT)
    return patient, diagnosis


def _check_file(path: Path) -> None:
    if not is_dicom(path):
        raise Refused(Reason.NOT_DICOM)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise Refused(Reason.TOO_LARGE)
    if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise Refused(Reason.DEFLATED)  # pydicom inflates the whole data set without a bound


def _check_header(dataset: Dataset) -> None:
    rows, columns = dataset.get("Rows"), dataset.get("Columns")
    if rows is None or columns is None:
        raise Refused(Reason.NO_IMAGE)
    check_size(int(rows), int(columns))
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise Refused(Reason.MULTI_FRAME)
    if dataset.get("BitsAllocated") not in (1, 8, 16, 32) or dataset.get("SamplesPerPixel", 1) not in (1, 3):
        raise Refused(Reason.HEADER)


def _check_decoder(dataset: Dataset) -> None:
    syntax: UID = dataset.file_meta.TransferSyntaxUID
    # Only a registered name may be shown: a private UID is text of the file.
    name = syntax.name if syntax in UID_dictionary else "an unregistered transfer syntax"
    try:
        plugins = get_decoder(syntax).available_plugins if syntax.is_compressed else ("native",)
    except (NotImplementedError, ValueError) as error:  # ValueError: not the UID of a transfer syntax
        raise Refused(Reason.NO_DECODER, name) from error
    twelve_bit = syntax == JPEGExtended12Bit and int(dataset.get("BitsStored", 0)) > 8
    if not plugins or (twelve_bit and plugins == ("pillow",)):  # Pillow reads 8 of the 12 bits, so it refuses
        raise Refused(Reason.NO_DECODER, name)


def _present(stored: Num[np.ndarray, "..."], dataset: Dataset) -> Levels:
    photometric = str(dataset.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        colour = apply_color_lut(stored, dataset)
        return colour[..., :3].astype(np.float32) * np.float32(255 / np.iinfo(colour.dtype).max)
    if stored.ndim == 3:
        bits = int(dataset.BitsStored)
        if photometric not in _COLOURS or (photometric != "RGB" and bits != 8):  # pydicom knows no other as colours
            raise Refused(Reason.PIXELS)
        return stored.astype(np.float32) * np.float32(255 / (2**bits - 1))
    grey = _view(_modality(stored, dataset), dataset)
    return np.float32(255) - grey if photometric == "MONOCHROME1" else grey


def _modality(stored: Num[np.ndarray, "rows columns"], dataset: Dataset) -> Float64[np.ndarray, "rows columns"]:
    if sequence := dataset.get("ModalityLUTSequence"):
        return _look_up(stored.astype(np.float64), sequence[0], dataset)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    values = stored.astype(np.float64)
    return values if slope is None or intercept is None else values * float(slope) + float(intercept)


def _view(values: Float64[np.ndarray, "rows columns"], dataset: Dataset) -> Grey:
    """Apply the first VOI LUT or window that makes sense, else the full range."""
    if not np.isfinite(values).all():
        raise Refused(Reason.NOT_FINITE)
    if sequence := dataset.get("VOILUTSequence"):
        top = 2.0 ** int(sequence[0].LUTDescriptor[2]) - 1
        return np.clip(_look_up(values, sequence[0], dataset) * (255 / top), 0, 255).astype(np.float32)
    centre, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    if centre is None or width is None or not width > (0.999 if function == "LINEAR" else 0):
        return full_range(values)
    return _window(values, centre, width, function)


def _window(values: Float64[np.ndarray, "rows columns"], centre: float, width: float, function: str) -> Grey:
    """Map a window to [0, 255].

    Written here because pydicom's own maps to a range that depends on BitsStored and the rescale.

    Source: DICOM PS3.3 C.11.2.1.2.1 (LINEAR) and C.11.2.1.3 (LINEAR_EXACT, SIGMOID).
    """
    if function == "SIGMOID":
        share = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    elif function == "LINEAR_EXACT":
        share = (values - centre) / width + 0.5
    else:
        share = (values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5
    return (np.clip(share, 0, 1) * 255).astype(np.float32)


def _look_up(
    values: Float64[np.ndarray, "rows columns"], item: Dataset, dataset: Dataset
) -> Float64[np.ndarray, "rows columns"]:
    """Send values through a LUT; those outside take its first or last entry.

    Written here because pydicom's own wraps around where values exceed the type of the entries.

    Source: DICOM PS3.3 C.11.1.1.1.
    """
    entries, first = int(item.LUTDescriptor[0]) or 2**16, int(item.LUTDescriptor[1])
    data = item.LUTData
    order = "<" if dataset.original_encoding[1] else ">"
    table = np.frombuffer(data, f"{order}u2") if isinstance(data, bytes) else np.asarray(data)
    index = np.clip(np.rint(values) - first, 0, min(entries, len(table)) - 1)
    return table.astype(np.float64)[index.astype(np.int64)]


def _first(value: Any) -> float | None:
    if value is None or isinstance(value, str):
        return None
    return float(value[0] if hasattr(value, "__getitem__") else value)


def _text(value: Any) -> str:
    """Return a tag's value as text; several values are joined as DICOM writes them."""
    if value is None or isinstance(value, bytes | Dataset):
        return ""
    several = not isinstance(value, str) and hasattr(value, "__getitem__")
    return ("\\".join(str(item) for item in value) if several else str(value)).strip().strip("\0").strip()


def _labels_file(folder: Path, label: LabelSource) -> tuple[Mapping[str, Row], str]:
    """Return the rows of `labels.csv` by file, and the column that holds labels ("" where a tag does)."""
    path = folder / LABELS_FILE
    if not path.is_file():
        if label.kind == "column":
            raise IntakeError(f"--label column:{label.name} needs {LABELS_FILE} (file, {label.name}) beside the DICOM.")
        return {}, ""
    table = read_table(path)
    file = table.column("file")
    by_file = {PurePosixPath(row[file]).as_posix(): row for row in table.rows}
    if len(by_file) != len(table.rows):
        raise IntakeError(f"{LABELS_FILE} names a file more than once. Keep one row for each file.")
    return by_file, table.column(label.name or "label") if label.kind in ("auto", "column") else ""
