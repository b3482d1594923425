"""A folder of PNG, JPEG or TIFF files or NIfTI volumes with a CSV index. Out of scope: colour management, EXIF.

A TIFF has one page; a volume gives the slices that the site's rules choose, all of the row's patient and label. The
index has the columns `file`, `patient` (or `patient_id`), `label` and, if wanted, `issuer` and `site`; capitals do
not count. Files are named relative to the folder. A file of the folder may be a symbolic link, a folder in it not.
"""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from client.intake.isolation import DecoderPool
from client.intake.pixels import Levels, check_size, full_range
from client.intake.records import (
    ALL,
    LabelSource,
    Record,
    Refusal,
    Room,
    Scan,
    Seen,
    Stamp,
    refuse_tag,
    scan_of,
    stamp_of,
    state_of,
)
from client.intake.refusals import DAMAGED, Reason, Refused, unopened
from client.intake.requests import ask_volume
from client.intake.rules import IntakeRules
from client.intake.sizes import Size, size_of
from client.intake.table import Table, normal, read_table, spelled_here
from client.intake.volumes import is_volume
from common.errors import IntakeError
from common.files import open_regular

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")

_PHOTOMETRIC = 262
"""Tag of a TIFF: 0 where the lowest value is white."""

# What Pillow raises beside; UnidentifiedImageError is an OSError.
_DAMAGED = (*DAMAGED, TypeError, AttributeError, ArithmeticError, RuntimeError, SyntaxError)


def scan_index(folder: Path, index: Path, label: LabelSource, rules: IntakeRules) -> Scan:
    """List the images that a CSV index names, looking at the first bytes of each.

    Raises:
        IntakeError: The index cannot be read or lacks a column.
        ConfigError: The labels are asked of a DICOM tag.
    """
    refuse_tag(label)
    table = read_table(index, f"The index {index.name}")
    file = table.column("file")
    patient = _patient_column(table)
    name = "" if label.kind == "none" else table.column(label.name or "label")
    root = folder.resolve()
    lines: dict[str, list[str]] = {}
    files = [spelled_here(root, row[file]) for row in table.rows]
    for row, of in zip(table.rows, files, strict=True):
        said = json.dumps([row.get("issuer", ""), row[patient], row[name] if name else ALL])
        lines.setdefault(normal(of), []).append(said)
    beside = {name: "\n".join(said) for name, said in lines.items()}
    items: list[Record | Refusal] = []
    for row, of, line in zip(table.rows, files, table.lines, strict=True):
        path, said = root, beside[normal(of)]
        try:
            path = _inside(root, of)
            _look_at(path)
            if not row[patient]:
                raise Refused(Reason.NO_PATIENT)
            stamp, seen, size = _look(path)
        except Refused as refusal:
            named = path if path != root else _named(root, of)
            items.append(Refusal(named, None, refusal.reason, stamp_of(named), said, line=line))
            continue
        text, who, site = row[name] if name else ALL, (row.get("issuer", ""), row[patient]), row.get("site") or None
        kept = Record(path, None, who, text or None, site, stamp=stamp, beside=said, seen=seen, line=line, size=size)
        items.append(kept)
    found = list(_with_slices(items, rules))
    return scan_of(
        [item for item in found if isinstance(item, Record)], [item for item in found if isinstance(item, Refusal)]
    )


def _with_slices(items: Sequence[Record | Refusal], rules: IntakeRules) -> Iterator[Record | Refusal]:
    """Yield what was found, volumes by their slices: the decoders' processes read their headers."""
    room = Room()
    with DecoderPool(rules) as pool:
        volumes = pool.answers(ask_volume(item.path, rules) for item in items if _is_whole_volume(item))
        for item in items:
            if isinstance(item, Refusal) or not _is_whole_volume(item):
                yield item
                continue
            axes = next(volumes)
            if isinstance(axes, str):
                yield item.refused(axes)
            elif not room.takes(len(numbers := rules.chosen(axes.slices))):
                yield item.refused(Reason.SOURCE_FRAMES)
            else:
                for number in numbers:
                    yield replace(item, frame=number, seen=(axes.state, ""), size=axes.size)


def _is_whole_volume(item: Record | Refusal) -> bool:
    return isinstance(item, Record) and is_volume(item.path)


def decode(source: BinaryIO) -> Levels:
    """Read one PNG, JPEG or TIFF file as grey or colour levels.

    8-bit files as they are (alpha is dropped), deeper ones stretched between the image's own minimum and maximum. Where
    a TIFF says that the lowest value is white, it is.

    Raises:
        Refused: It is damaged, too large, of several frames, or none of these.
    """
    try:
        with Image.open(source, formats=("PNG", "JPEG", "TIFF")) as image:
            check_size(image.height, image.width)
            # A directory that names another one and leads to none, such as itself, is of no one page either.
            if getattr(image, "n_frames", 1) != 1 or (isinstance(image, TiffImageFile) and image.tag_v2.next):
                raise Refused(Reason.MULTI_FRAME)
            return _levels(image)
    except Image.DecompressionBombError as error:
        raise Refused(Reason.TOO_LARGE) from error
    except _DAMAGED as error:
        raise Refused(Reason.PIXELS) from error


def _levels(image: Image.Image) -> Levels:
    if image.mode in ("L", "LA", "1"):
        return np.asarray(image.convert("L"), dtype=np.float32)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        # Pillow turns the depths around that it reads as L, and where the tag is missing takes it as 0.
        white_is_zero = isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC, 0) == 0
        return full_range(-values.astype(np.float64) if white_is_zero else values)
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def _named(root: Path, name: str) -> Path:
    """Return the place of a file that cannot be had; the folder itself where the name leads out of it or is none."""
    relative = PurePosixPath(name)
    inside = name and "\0" not in name and not relative.is_absolute() and ".." not in relative.parts
    return root / relative if inside else root


def _inside(root: Path, name: str) -> Path:
    """Return the path that the index means, refusing every way out of the folder."""
    if not name:
        raise Refused(Reason.MISSING)
    relative = PurePosixPath(name)
    if "\0" in name or relative.is_absolute() or ".." in relative.parts:
        raise Refused(Reason.OUTSIDE)
    path = root / relative
    try:
        outside = not path.parent.resolve().is_relative_to(root)
    except (OSError, RuntimeError) as error:  # a name too long; RuntimeError: links in a circle
        raise Refused(Reason.MISSING) from error
    if outside:
        raise Refused(Reason.OUTSIDE)
    return path


def _look_at(path: Path) -> None:
    """Refuse what is no file: a pipe or device would hang the reader."""
    try:
        if not path.exists():
            raise Refused(Reason.MISSING)
        if not path.is_file():
            raise Refused(Reason.NOT_A_FILE)
    except OSError as error:
        raise (Refused(Reason.MISSING) if error.errno == errno.ENAMETOOLONG else unopened(error)) from error


def _look(path: Path) -> tuple[Stamp, Seen, Size | None]:
    """Return a file's stamp, and of a picture its state and the size that it states; a volume is opened elsewhere."""
    if is_volume(path):
        return stamp_of(path), ("", ""), None
    try:
        with open_regular(path) as handle:
            about = os.fstat(handle.fileno())
            if not handle.read(8).startswith(_MAGIC):
                raise Refused(Reason.NOT_PNG_JPEG)
            handle.seek(0)
            return (about.st_size, about.st_mtime_ns), (state_of(about), ""), size_of(handle)
    except OSError as error:
        raise unopened(error) from error


def _patient_column(table: Table) -> str:
    for name in ("patient", "patient_id"):
        if name in table.columns:
            return name
    raise IntakeError(
        "The CSV index has no column patient (or patient_id). Privacy is promised to each patient as a whole, so every "
        "image must name its patient. If the folder holds DICOM files, name the CSV file labels.csv."
    )
