"""What a scan finds, before any pixel is decoded. Out of scope: how each kind of source is read."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from common.errors import ConfigError

ALL = "all"
"""The one class of every image when labels are switched off."""
MAX_FRAMES = 2**20
"""Of a source's files of several frames together: to state many costs a file nothing, and each one is kept."""


Stamp = tuple[int, int]
"""Size in bytes and time of change in ns of a file, as the file system says: another one means that it changed."""

Seen = tuple[str, str]
"""What tells a later reader that it reads what the scan saw: `state_of` the file, and of DICOM a digest of what the
header says about whose picture it is and whether it may be used."""

Skip = Callable[[Path, Stamp, str], bool]
"""Whether a file of this stamp, of which a table beside says this, is known already and need not be opened."""

Region = tuple[int, int, int, int]
"""A part of an image that is made black: left, top, width and height in its own pixels."""


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
        beside: What a table beside the files (index.csv, labels.csv) says of the file; "" where there is none.
        blank: Parts that are made black before anything else is done with the image.
        seen: What the scan saw; bytes that are not these are not decoded.
        line: Of the index that names the image, from 1; 0 where no index does.
        size: Columns and rows as the file states them, for reports; None where they are in `header`, or not stated.
    """

    path: Path = field(repr=False)
    frame: int | None = field(repr=False)
    patient: tuple[str, str] = field(repr=False)
    label: str | None = field(repr=False)
    site: str | None = field(repr=False)
    member: str | None = field(default=None, repr=False)
    stamp: Stamp = field(default=(0, 0), repr=False)
    header: Mapping[str, str] = field(default_factory=dict[str, str], repr=False, compare=False)
    beside: str = field(default="", repr=False)
    blank: tuple[Region, ...] = field(default=(), repr=False)
    seen: Seen = field(default=("", ""), repr=False)
    line: int = field(default=0, repr=False)
    size: tuple[int, int] | None = field(default=None, repr=False, compare=False)

    @property
    def stated_size(self) -> tuple[int, int] | None:
        """Return columns and rows as the file states them."""
        rows, columns = (self.header.get(name, "") for name in ("Rows", "Columns"))
        return (int(columns), int(rows)) if rows.isdecimal() and columns.isdecimal() else self.size

    def refused(self, reason: str) -> "Refusal":
        """Return that this image is not used."""
        return Refusal(self.path, self.member, reason, self.stamp, self.beside, self.frame, self.line)


@final
@dataclass(frozen=True)
class Header:
    """What the scan needs of a header. Its repr shows nothing.

    Attributes:
        patient: (issuer, id).
        label: Of the tag or by the rules that labels are read from; "" for none.
        frames: Number of frames; None where the file does not say, so that it is one.
        facts: See `client.intake.headers.FACTS`.
        seen: What tells a later reader that the file is the same.
    """

    patient: tuple[str, str] = field(repr=False)
    label: str = field(repr=False)
    frames: int | None = field(repr=False)
    facts: Mapping[str, str] = field(repr=False)
    seen: Seen = field(repr=False)


@final
@dataclass(frozen=True)
class Axes:
    """What the scan needs of a volume's header.

    Attributes:
        slices: How many axial slices there are.
        size: Columns and rows of each.
        state: Of the file.
    """

    slices: int
    size: tuple[int, int]
    state: str


@final
@dataclass(frozen=True, slots=True)
class Refusal:
    """One file, member, frame or row that is not used, and why. Its repr shows the reason alone."""

    path: Path = field(repr=False)
    member: str | None = field(repr=False)
    reason: str
    stamp: Stamp = field(default=(0, 0), repr=False)
    beside: str = field(default="", repr=False)
    frame: int | None = field(default=None, repr=False)
    line: int = field(default=0, repr=False)


@final
@dataclass(frozen=True)
class Scan:
    """All images of a source and what was refused. Its repr shows nothing.

    Attributes:
        records: The images in a fixed order.
        refused: Counts by reason.
        refusals: The same one by one, where the source is a folder or an archive; not kept by parts of a scan.
        skipped: Files that the caller knew and that were not opened.
        kind: What the source was taken for, in words.
    """

    records: tuple[Record, ...] = field(repr=False)
    refused: Mapping[str, int] = field(repr=False)
    refusals: tuple[Refusal, ...] = field(default=(), repr=False)
    skipped: tuple[Path, ...] = field(default=(), repr=False)
    kind: str = field(default="", repr=False)


@final
class Room:
    """How many frames of files of several a source may still have."""

    def __init__(self, taken: int = 0) -> None:
        """Start with `MAX_FRAMES` less those that files which are not opened hold already."""
        self._left = MAX_FRAMES - taken

    def takes(self, frames: int) -> bool:
        """Make room for a file's frames and return True, if there is room; a file of one needs none."""
        if frames > max(1, self._left):
            return False
        self._left -= frames if frames > 1 else 0
        return True


@final
@dataclass(frozen=True)
class Known:
    """What the caller of a scan knows of files already.

    Attributes:
        skip: Whether a file need not be opened.
        frames: Of what a scan has found, how many frames the files of several hold together that were skipped, or could
            not be reached and stay as they were.
    """

    skip: Skip = field(default=lambda _path, _stamp, _beside: False)
    frames: Callable[[Scan], int] = field(default=lambda _found: 0)


NOTHING_KNOWN = Known()


def scan_of(records: Iterable[Record], refusals: Iterable[Refusal], skipped: Iterable[Path] = ()) -> Scan:
    """Return a scan that counts its refusals."""
    kept = tuple(refusals)
    return Scan(tuple(records), dict(Counter(refusal.reason for refusal in kept)), kept, tuple(skipped))


def stamp_of(path: Path) -> Stamp:
    """Return a file's stamp; zeros where it is gone."""
    try:
        about = path.stat()
    except OSError:
        return (0, 0)
    return (about.st_size, about.st_mtime_ns)


def state_of(about: os.stat_result) -> str:
    """Return what changes when a file is written to or another takes its place.

    Not its inode: shares that are mounted make these up as they need them. What is renamed has another time of change
    of status, whatever its other times.
    """
    return f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"


@final
@dataclass(frozen=True)
class LabelSource:
    """Where labels are: `auto`, `none`, a DICOM keyword (`tag`), a CSV column or NPZ array, a file of rules."""

    kind: Literal["auto", "none", "tag", "column", "rules"]
    name: str = ""


def parse_label(text: str) -> LabelSource:
    """Read the value of `--label`.

    Raises:
        ConfigError: It has none of the five forms.

    >>> parse_label("column:finding").name
    'finding'
    """
    kind, _, name = text.partition(":")
    if text in ("auto", "none"):
        return LabelSource("auto" if text == "auto" else "none")
    for known in ("tag", "column", "rules"):
        if kind == known and name.strip():
            return LabelSource(known, name.strip())
    raise ConfigError(f"Expected --label auto, none, tag:KEYWORD, column:NAME or rules:FILE, got {text!r}.")


def refuse_tag(label: LabelSource) -> None:
    """Say that a source without DICOM tags cannot take labels from one.

    Raises:
        ConfigError: The labels are asked of a tag.
    """
    if label.kind in ("tag", "rules"):
        raise ConfigError(
            f"--label {label.kind}:{label.name} reads DICOM, and this source is not DICOM. Use column:NAME."
        )
