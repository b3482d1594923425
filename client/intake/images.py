"""A folder of PNG, JPEG or TIFF files or NIfTI volumes with a CSV index. Out of scope: colour management, EXIF.

A TIFF has one page; a volume gives the slices that the site's rules choose, all of the row's patient and label. The
index has the columns `file`, `patient` (or `patient_id`), `label` and, if wanted, `issuer` and `site`; capitals do
not count. Files are named relative to the folder. A file of the folder may be a symbolic link, a folder in it not.
"""

import json
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from client.intake.pixels import Levels, check_size, full_range
from client.intake.records import ALL, LabelSource, Record, Refusal, Scan, refuse_tag, scan_of, stamp_of
from client.intake.refusals import DAMAGED, Reason, Refused
from client.intake.rules import IntakeRules
from client.intake.sizes import Size, size_of
from client.intake.table import Table, read_table
from client.intake.volumes import Volume, is_volume
from common.errors import IntakeError

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")

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
    records: list[Record] = []
    refusals: list[Refusal] = []
    root = folder.resolve()
    lines: dict[str, list[str]] = {}
    for row in table.rows:
        said = json.dumps([row.get("issuer", ""), row[patient], row[name] if name else ALL])
        lines.setdefault(row[file], []).append(said)
    beside = {name: "\n".join(said) for name, said in lines.items()}
    for row, line in zip(table.rows, table.lines, strict=True):
        path = root
        try:
            path = _inside(root, row[file])
            if not row[patient]:
                raise Refused(Reason.NO_PATIENT)
            frames, size = _frames(path, rules)
        except Refused as refusal:
            named = path if path != root else _named(root, row[file])
            refusals.append(Refusal(named, None, refusal.reason, stamp_of(named), beside[row[file]], line=line))
            continue
        text, patients = row[name] if name else ALL, (row.get("issuer", ""), row[patient])
        for frame in frames:
            site = row.get("site") or None
            stamp = stamp_of(path)
            said = beside[row[file]]
            records.append(
                Record(path, frame, patients, text or None, site, stamp=stamp, beside=said, line=line, size=size)
            )
    return scan_of(records, refusals)


def decode(path: Path, rules: IntakeRules) -> Levels:
    """Read one PNG, JPEG or TIFF file as grey or colour levels.

    8-bit files as they are (alpha is dropped), deeper ones stretched between the image's own minimum and maximum.

    Raises:
        Refused: It is damaged, too large, of several frames, or none of these.
    """
    try:
        if path.stat().st_size > rules.max_bytes:
            raise Refused(Reason.TOO_LARGE)
        with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
            check_size(image.height, image.width)
            if getattr(image, "n_frames", 1) != 1:
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
        return full_range(np.asarray(image))
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def _frames(path: Path, rules: IntakeRules) -> tuple[tuple[int | None, ...], Size | None]:
    """Return which slices of a file are read, None for a file of one image, and the size that it states."""
    if is_volume(path):
        volume = Volume(path, rules)
        return rules.chosen(volume.slices), volume.size
    try:
        with path.open("rb") as handle:
            return (None,), size_of(handle)
    except OSError as error:
        raise Refused(Reason.MISSING) from error


def _named(root: Path, name: str) -> Path:
    """Return the place of a file that cannot be had; the folder itself where the name leads out of it or is none."""
    relative = PurePosixPath(name)
    inside = name and "\0" not in name and not relative.is_absolute() and ".." not in relative.parts
    return root / relative if inside else root


def _inside(root: Path, name: str) -> Path:
    """Return the file that the index means, refusing every way out of the folder."""
    relative = PurePosixPath(name)
    if not name:
        raise Refused(Reason.MISSING)
    if "\0" in name or relative.is_absolute() or ".." in relative.parts:
        raise Refused(Reason.OUTSIDE)
    path = root / relative
    try:
        if not path.parent.resolve().is_relative_to(root):
            raise Refused(Reason.OUTSIDE)
        if not path.exists():
            raise Refused(Reason.MISSING)
        if not path.is_file():  # a pipe or device would hang the reader
            raise Refused(Reason.NOT_A_FILE)
        with path.open("rb") as handle:
            start = handle.read(8)
    except (OSError, RuntimeError) as error:  # a name too long, no permission; RuntimeError: links in a circle
        raise Refused(Reason.MISSING) from error
    if not (start.startswith(_MAGIC) or is_volume(path)):
        raise Refused(Reason.NOT_PNG_JPEG)
    return path


def _patient_column(table: Table) -> str:
    for name in ("patient", "patient_id"):
        if name in table.columns:
            return name
    raise IntakeError(
        "The CSV index has no column patient (or patient_id). Privacy is promised to each patient as a whole, so every "
        "image must name its patient. If the folder holds DICOM files, name the CSV file labels.csv."
    )
