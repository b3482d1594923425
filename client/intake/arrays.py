"""Images in one NPZ file. Every array's header is checked before the array is allocated. Out of scope: files per image.

Accepted: `images` (N,H,W), (N,H,W,1), (N,H,W,3) or (N,1,H,W) with `patient_id` and, as there are, `labels`, `issuer`
and `site`; or the MNIST form `x_train` with `y_train`, where each image is a person of its own.

How values become levels, image by image: uint8 as it is; uint16 stretched between the image's own minimum and maximum,
all colours together, since the depth is not stated; floats in [-1, 1] when a value is below 0, else in [0, 1] when none
is above 1, else in [0, 255]. Store uint8 where this rule could guess wrong.
"""

import io
import math
import os
import tokenize
import zipfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Num
from numpy.lib import format as npy

from client.intake.archives import inflates_in_bounds, open_zip
from client.intake.pixels import Levels, check_size, full_range
from client.intake.records import ALL, LabelSource, Record, Refusal, Scan, refuse_tag, state_of
from client.intake.refusals import DAMAGED, Reason, Refused
from common.errors import IntakeError
from common.files import open_regular

MAX_DECODED_BYTES = 2 * 1024**3
MAX_IMAGES = 4 * 1024**2
_SHOWN = 3
"""Rows without a patient that are named; there may be millions."""
_HEADER_BYTES = 16 * 1024
"""Read of an array for its header: numpy takes none above 10,000 characters, but reads it whole before it says so."""

# What zipfile and the npy header parser raise beside; RuntimeError is encryption and recursion.
_DAMAGED = (
    *DAMAGED,
    TypeError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
)

_STACKS = ("images", "x_train")
_Header = tuple[tuple[int, ...], np.dtype[Any]]


def scan_arrays(path: Path, label: LabelSource) -> Scan:
    """List the images of an NPZ from its headers and its one-dimensional arrays.

    Raises:
        IntakeError: It is damaged or too large, has no `images` or no `patient_id`, or its lengths disagree.
        ConfigError: The labels are asked of a DICOM tag.
    """
    refuse_tag(label)
    with _file(path) as handle, _opened(handle) as archive:
        about = os.fstat(handle.fileno())
        stack = _stack_name(archive)
        _check_sizes(archive, [stack, _label_name(label, stack), "patient_id", "issuer", "site"])
        shape = _header(archive, stack)[0]
        count = _count(shape)
        labels = _labels(archive, label, stack, count)
        patients = _patients(archive, stack, count)
        issuers = _column(archive, "issuer", count) if _has(archive, "issuer") else [""] * count
        sites = _column(archive, "site", count) if _has(archive, "site") else [""] * count
    rows, columns = _sides(shape)
    named = zip(issuers, patients, labels, sites, strict=True)
    stamp, seen, size = (about.st_size, about.st_mtime_ns), (state_of(about), ""), (columns, rows)
    records: list[Record] = []
    lost: list[int] = []
    for row, (issuer, patient, name, site) in enumerate(named):
        if patient:
            who = issuer, patient
            records.append(Record(path, row, who, name or None, site or None, stamp=stamp, seen=seen, size=size))
        else:
            lost.append(row)
    shown = tuple(Refusal(path, None, Reason.NO_PATIENT, stamp, frame=row) for row in lost[:_SHOWN])
    return Scan(tuple(records), {str(Reason.NO_PATIENT): len(lost)} if lost else {}, shown)


def load_stack(handle: BinaryIO) -> npt.NDArray[Any]:
    """Read the array of all images.

    Raises:
        IntakeError: It is damaged, too large, or of no accepted form.
    """
    with _opened(handle) as archive:
        name = _stack_name(archive)
        _count(_header(archive, name)[0])
        return _read(archive, name)


def levels_of(image: Num[np.ndarray, "..."]) -> Levels:
    """Turn one image of the array into levels.

    Raises:
        Refused: A value is not finite or in no range that is known.
    """
    return _levels(_picture(image))


def _picture(image: Num[np.ndarray, "..."]) -> Num[np.ndarray, "rows columns *colours"]:
    """Drop the axis of a single channel, which may be the first or the last."""
    if image.ndim == 2 or image.shape[-1] == 3:
        return image
    return image.reshape(image.shape[-2:] if image.shape[-1] > 1 else image.shape[:2])


def _levels(values: Num[np.ndarray, "rows columns *colours"]) -> Levels:
    if values.dtype == np.uint8:
        return values.astype(np.float32)
    if values.dtype.kind == "u":
        return full_range(values)
    return _float_levels(values)


def _float_levels(values: Float[np.ndarray, "rows columns *colours"]) -> Levels:
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise Refused(Reason.NOT_FINITE)
    if low < -1 or high > (255 if low >= 0 else 1):
        raise Refused(Reason.OUT_OF_RANGE)
    wide = values.astype(np.float32)
    if low < 0:
        return (wide + np.float32(1)) * np.float32(127.5)
    return wide * np.float32(255) if high <= 1 else wide


def _patients(archive: zipfile.ZipFile, stack: str, count: int) -> list[str]:
    if _has(archive, "patient_id"):
        return _column(archive, "patient_id", count)
    if stack == "x_train":
        return [str(row) for row in range(count)]
    raise IntakeError(
        "The NPZ has images but no patient_id. Privacy is promised to each patient as a whole, so every image must "
        "name its patient: add an array patient_id (text or integers) with one entry for each image."
    )


def _label_name(label: LabelSource, stack: str) -> str:
    return label.name or ("labels" if stack == "images" else "y_train")


def _labels(archive: zipfile.ZipFile, label: LabelSource, stack: str, count: int) -> list[str]:
    if label.kind == "none":
        return [ALL] * count
    name = _label_name(label, stack)
    if not _has(archive, name):
        raise IntakeError(
            f"The NPZ has no array {name!r} with labels. Add one, name another with --label column:NAME, or give "
            "--label none to learn one class."
        )
    return _column(archive, name, count)


def _column(archive: zipfile.ZipFile, name: str, count: int) -> list[str]:
    shape, kind = _header(archive, name)
    if shape not in ((count,), (count, 1)):
        raise IntakeError(f"Expected one entry of {name} for each of {count} images, got the shape {shape}.")
    if name == "patient_id" and kind.kind not in "USiu":
        raise IntakeError(
            f"Expected patient_id as text or integers, got {kind.name}: other types do not keep ids apart."
        )
    return [_text(value) for value in _read(archive, name).reshape(-1).tolist()]


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode().strip()
    if isinstance(value, float):
        whole = math.isfinite(value) and value.is_integer()
        return str(int(value)) if whole else "" if math.isnan(value) else str(value)
    return str(int(value) if isinstance(value, bool) else value).strip()


def _has(archive: zipfile.ZipFile, name: str) -> bool:
    return f"{name}.npy" in archive.NameToInfo


def _stack_name(archive: zipfile.ZipFile) -> str:
    for name in _STACKS:
        if _has(archive, name):
            return name
    raise IntakeError("The NPZ has neither `images` (with patient_id and labels) nor MNIST's `x_train`. Rename them.")


def _count(shape: tuple[int, ...]) -> int:
    """Return how many images an array of this shape holds."""
    if not (len(shape) == 3 or (len(shape) == 4 and (shape[3] in (1, 3) or shape[1] == 1))):
        raise IntakeError(f"Expected images of shape (N,H,W), (N,H,W,1), (N,H,W,3) or (N,1,H,W), got {shape}.")
    if not 1 <= shape[0] <= MAX_IMAGES:
        raise IntakeError(f"Expected 1 to {MAX_IMAGES} images in an NPZ, got {shape[0]}.")
    try:
        check_size(*_sides(shape))
    except Refused as refusal:
        raise IntakeError(f"Expected images of a pixel or more in the NPZ, got {shape}: {refusal}.") from refusal
    return shape[0]


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of the images of an array."""
    first = 2 if len(shape) == 4 and shape[3] not in (1, 3) else 1
    return shape[first], shape[first + 1]


def _header(archive: zipfile.ZipFile, name: str) -> _Header:
    """Read an array's shape and type, and refuse types that are not expected or would be unpickled."""
    with archive.open(f"{name}.npy") as member:
        start = io.BytesIO(member.read(_HEADER_BYTES))
    version = npy.read_magic(start)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, kind = read(start)
    # Only a type's `name` is shown: as text it would name its fields, which are text of the file.
    pixels = (kind.kind == "u" and kind.itemsize <= 2) or kind.kind == "f"
    if not (pixels if name in _STACKS else kind.kind in "USiubf") or kind.itemsize == 0:
        raise IntakeError(
            f"Expected uint8, uint16 or float images and text or numbers beside, got {kind.name} in {name}."
        )
    return shape, kind


def _check_sizes(archive: zipfile.ZipFile, names: Sequence[str]) -> None:
    headers = [_header(archive, name) for name in names if _has(archive, name)]
    size = sum(math.prod(shape) * kind.itemsize for shape, kind in headers)
    if size > MAX_DECODED_BYTES:
        raise IntakeError(f"The NPZ would take {size} bytes of memory, the limit is {MAX_DECODED_BYTES}. Split it.")


def _read(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    _check_sizes(archive, [name])
    with archive.open(f"{name}.npy") as member:
        return npy.read_array(member, allow_pickle=False)


def _checked(handle: BinaryIO) -> zipfile.ZipFile:
    """Open an NPZ whose directory is within the limits and whose members inflate no further than is asked for."""
    try:
        archive = open_zip(handle)
        if not all(inflates_in_bounds(member) for member in archive.infolist()):
            archive.close()
            raise Refused(Reason.COMPRESSION)
    except Refused as refusal:
        raise IntakeError(f"The NPZ is refused: {refusal}. Export it again with numpy.savez_compressed.") from None
    return archive


def _file(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except OSError as error:
        raise IntakeError(f"The NPZ cannot be read: {error.strerror}. Mend its permissions, or remove it.") from None


@contextmanager
def _opened(handle: BinaryIO) -> Generator[zipfile.ZipFile, None, None]:
    try:
        with _checked(handle) as archive:
            yield archive
    except _DAMAGED:  # the cause quotes the file, so it is dropped
        raise IntakeError("The NPZ is damaged or not an NPZ. Export it again with numpy.savez_compressed.") from None
