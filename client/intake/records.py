"""What a scan finds, before any pixel is decoded. Out of scope: how each kind of source is read."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from common.errors import ConfigError

ALL = "all"
"""The one class of every image when labels are switched off."""


Stamp = tuple[int, int]
"""Size in bytes and time of change in ns of a file, as the file system says: another one means that it changed."""


@final
@dataclass(frozen=True, slots=True)
class Record:
    """One image that was found and not yet decoded. Its repr shows nothing.

    (path, member, frame) names the image within its source and is all that is needed to read it again.

    Attributes:
        path: The file: the image's own, or an archive, a volume, an NPZ.
        frame: The image's place in a file of several, from 0: frame, slice or row; None for a file of one image.
        patient: (issuer, id), together the unit of privacy; the issuer may be empty.
        label: The class name; None where the source gives none.
        site: The value of the site column or array; None where there is none.
        member: Its name within the archive `path`; None where that is no archive.
        stamp: Size and time of change of `path` when it was scanned.
        header: Of DICOM, the values of `client.intake.headers.FACTS` that are there, by keyword. Patients' data.
    """

    path: Path = field(repr=False)
    frame: int | None = field(repr=False)
    patient: tuple[str, str] = field(repr=False)
    label: str | None = field(repr=False)
    site: str | None = field(repr=False)
    member: str | None = field(default=None, repr=False)
    stamp: Stamp = field(default=(0, 0), repr=False)
    header: Mapping[str, str] = field(default_factory=dict[str, str], repr=False, compare=False)


@final
@dataclass(frozen=True, slots=True)
class Refusal:
    """One file, member or row that is not used, and why. Its repr shows the reason alone."""

    path: Path = field(repr=False)
    member: str | None = field(repr=False)
    reason: str
    stamp: Stamp = field(default=(0, 0), repr=False)


@final
@dataclass(frozen=True)
class Scan:
    """All images of a source and what was refused. Its repr shows nothing.

    Attributes:
        records: The images in a fixed order.
        refused: Counts by reason.
        refusals: The same one by one, where the source is a folder or an archive; not kept by parts of a scan.
    """

    records: tuple[Record, ...] = field(repr=False)
    refused: Mapping[str, int] = field(repr=False)
    refusals: tuple[Refusal, ...] = field(default=(), repr=False)


def scan_of(records: Iterable[Record], refusals: Iterable[Refusal]) -> Scan:
    """Return a scan that counts its refusals."""
    kept = tuple(refusals)
    return Scan(tuple(records), dict(Counter(refusal.reason for refusal in kept)), kept)


def stamp_of(path: Path) -> Stamp:
    """Return a file's stamp; zeros where it is gone."""
    try:
        about = path.stat()
    except OSError:
        return (0, 0)
    return (about.st_size, about.st_mtime_ns)


@final
@dataclass(frozen=True)
class LabelSource:
    """Where labels are: `auto`, `none`, a DICOM keyword (`tag`), a CSV column or NPZ array (`column`)."""

    kind: Literal["auto", "none", "tag", "column"]
    name: str = ""


def parse_label(text: str) -> LabelSource:
    """Read the value of `--label`.

    Raises:
        ConfigError: It has none of the four forms.

    >>> parse_label("column:finding").name
    'finding'
    """
    kind, _, name = text.partition(":")
    if text in ("auto", "none"):
        return LabelSource("auto" if text == "auto" else "none")
    if kind in ("tag", "column") and name.strip():
        return LabelSource("tag" if kind == "tag" else "column", name.strip())
    raise ConfigError(f"Expected --label auto, none, tag:KEYWORD or column:NAME, got {text!r}.")


def refuse_tag(label: LabelSource) -> None:
    """Say that a source without DICOM tags cannot take labels from one.

    Raises:
        ConfigError: The labels are asked of a tag.
    """
    if label.kind == "tag":
        raise ConfigError(f"--label tag:{label.name} reads DICOM, and this source is not DICOM. Use column:NAME.")
