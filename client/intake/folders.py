"""Where DICOM files stand: a folder tree, zip archives in it or alone, or what a DICOMDIR names. Headers only.

A tree is walked whole; files that a DICOMDIR in it names and that are not there are counted. Labels come from tags, or
from `labels.csv`: `file` is relative to the folder, of a member `ARCHIVE.zip/MEMBER`.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import final

from pydicom.datadict import tag_for_keyword

from client.intake.archives import Archive
from client.intake.directory import named_files
from client.intake.isolation import DecoderPool
from client.intake.labels import Labelling, TagLabel, read_label_rules
from client.intake.records import ALL, Header, LabelSource, Record, Refusal, Room, Scan, Skip, Stamp, scan_of, stamp_of
from client.intake.refusals import Reason, Refused
from client.intake.requests import Asked, ask_header
from client.intake.rules import IntakeRules
from client.intake.table import Row, read_table
from client.paths import INCOMING
from common.errors import ConfigError, IntakeError

LABELS_FILE = "labels.csv"
AUTO_TAG = "AdmittingDiagnosesDescription"
_LINK_TO_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

Found = Record | Refusal


@final
@dataclass(frozen=True)
class _Search:
    """What one scan looks for; by file, `lines` of the table, `beside` what it says of it and of all its members."""

    rules: IntakeRules
    label: LabelSource
    labels: Labelling
    table: Mapping[str, Row] = field(repr=False)
    lines: Mapping[str, int] = field(repr=False)
    column: str
    beside: Mapping[str, str] = field(repr=False)
    skip: Skip | None
    skipped: list[Path] = field(repr=False)
    met: set[str] = field(default_factory=set[str], repr=False)
    room: Room = field(default_factory=Room)


def scan_folder(folder: Path, label: LabelSource, rules: IntakeRules, skip: Skip | None = None) -> Scan:
    """List the images of all DICOM files below a folder, from their headers.

    Raises:
        IntakeError: `labels.csv` is needed and missing, or cannot be read.
        ConfigError: The label's tag is not a DICOM keyword.
    """
    return _scan(walk(folder), folder, _search(folder, label, rules, skip), in_tree=True)


def scan_file(path: Path, label: LabelSource, rules: IntakeRules, skip: Skip | None = None) -> Scan:
    """List the images of one file: a zip archive, or a DICOM file.

    Raises:
        IntakeError, ConfigError: As in `scan_folder`.
    """
    return _scan([path], path.parent, _search(path.parent, label, rules, skip))


def scan_directory(path: Path, label: LabelSource, rules: IntakeRules, skip: Skip | None = None) -> Scan:
    """List the images of the files that a DICOMDIR names.

    Raises:
        IntakeError, ConfigError: As in `scan_folder`; also where the DICOMDIR itself cannot be read.
    """
    search = _search(path.parent, label, rules, skip)
    named = (Refusal(path, None, one) if isinstance(one, Reason) else one for one in named_files(path, rules))
    try:
        return _scan(named, path.parent, search)
    except Refused as refusal:
        raise IntakeError(f"The DICOMDIR cannot be read: {refusal}. Give the folder instead.") from refusal


def is_archive(path: Path) -> bool:
    """Return whether a file is called like a zip archive."""
    return path.suffix.lower() == ".zip"


def walk(folder: Path) -> Iterator[Path | Refusal]:
    """Yield every regular file in a fixed order, and a refusal for what is no file and what cannot be entered.

    What a pull has not kept yet is none of the source's: it may be half, or not what was asked for.
    """
    unreadable: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=lambda error: unreadable.append(Path(error.filename))):
        try:
            enter(root)
        except OSError:
            unreadable.append(Path(root))
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name != INCOMING or Path(root) != folder)
        places = [Path(root) / name for name in (*folders, *sorted(names))]
        for number, path in enumerate(places):
            if number < len(folders):
                if _is_link(path):
                    yield Refusal(path, None, Reason.NOT_A_FILE)
            elif (reason := _no_file(path)) is not None:
                yield Refusal(path, None, reason)
            elif path != folder / LABELS_FILE:
                yield path
    for path in unreadable:
        yield Refusal(path, None, Reason.FOLDER)


def _is_link(folder: Path) -> bool:
    try:
        return folder.is_symlink()
    except OSError:  # its path is too long, say: what keeps it from being entered is told when that is tried
        return False


def enter(folder: str | Path) -> None:
    """Find out whether the files of a folder can be reached, not only listed.

    Raises:
        OSError: They cannot.
    """
    os.stat(f"{folder}/.")  # noqa: PTH116 - a Path drops the dot


def _no_file(path: Path) -> Reason | None:
    try:
        return None if stat.S_ISREG(path.stat().st_mode) else Reason.NOT_A_FILE
    except OSError as error:
        return Reason.NOT_A_FILE if error.errno in _LINK_TO_NOWHERE else Reason.NOT_READABLE


def _search(folder: Path, label: LabelSource, rules: IntakeRules, skip: Skip | None) -> _Search:
    table, lines, column = _labels_file(folder, label)
    labels: Labelling = TagLabel(tag=label.name if label.kind == "tag" else AUTO_TAG)
    if label.kind == "rules":
        labels = read_label_rules(Path(label.name))
    for keyword in labels.tags():
        if tag_for_keyword(keyword) is None:
            raise ConfigError(f"Expected DICOM keywords such as {AUTO_TAG} to read labels from, got {keyword!r}.")
    return _Search(rules, label, labels, table, lines, column, _beside(table, column), skip, [])


def _beside(table: Mapping[str, Row], column: str) -> Mapping[str, str]:
    """Return what the table says of each file; of an archive, of all its members in turn."""
    texts: dict[str, list[str]] = {}
    for place, row in table.items() if column else ():
        end = place.lower().find(".zip/")
        texts.setdefault(place if end < 0 else place[: end + 4], []).append(f"{place}={row.get(column, '')}")
    return {place: "\n".join(lines) for place, lines in texts.items()}


def _scan(paths: Iterable[Path | Refusal], folder: Path, search: _Search, in_tree: bool = False) -> Scan:
    """List what files hold; their headers are read by the decoders' processes, a few at a time."""
    items: deque[_File | Refusal] = deque()
    found: list[Found] = []

    def asked() -> Iterator[Asked[Header]]:
        for path in paths:
            for item in [path] if isinstance(path, Refusal) else _items(path, folder, search):
                items.append(item)
                if isinstance(item, _File):
                    yield ask_header(item.path, item.member, search.labels, search.rules)

    with DecoderPool(search.rules) as pool:
        for header in pool.answers(asked()):
            while isinstance(item := items.popleft(), Refusal):
                found.append(item)
            found.extend([item.refusal(header)] if isinstance(header, str) else _records(item, header, search))
            if in_tree and item.member is None and header == Reason.INDEX:
                found.extend(_missing(item.path, search.rules))
    found += [item for item in items if isinstance(item, Refusal)]
    found.extend(_rows_without_files(folder, search))
    records = [item for item in found if isinstance(item, Record)]
    refusals = [item for item in found if isinstance(item, Refusal)]
    return scan_of(records, refusals, search.skipped)


@final
@dataclass(frozen=True, slots=True)
class _File:
    """A file or member that is opened; `place` is its path within the folder, `beside` what the table says of it."""

    path: Path = field(repr=False)
    place: str = field(repr=False)
    stamp: Stamp
    beside: str = field(repr=False)
    member: str | None = field(default=None, repr=False)

    def refusal(self, reason: str) -> Refusal:
        return Refusal(self.path, self.member, reason, self.stamp, self.beside)


def _items(path: Path, folder: Path, search: _Search) -> Iterator[_File | Refusal]:
    """Yield what of a file is to be opened, itself or its members, and what of it is refused before."""
    place = path.relative_to(folder).as_posix()
    search.met.add(place)
    file = _File(path, place, stamp_of(path), search.beside.get(place, ""))
    if search.skip is not None and search.skip(path, file.stamp, file.beside):
        search.skipped.append(path)
    elif not is_archive(path):
        yield file
    else:
        for member in _members(file):
            search.met.add(f"{place}/{member.member}")
            yield member


def _members(file: _File) -> Iterator[_File | Refusal]:
    try:
        with Archive(file.path) as archive:
            members = archive.members()
    except Refused as refusal:
        yield file.refusal(refusal.reason)
        return
    for name, had in members:
        member = replace(file, place=f"{file.place}/{name}", member=name)
        # If not, another member has this name and would be read in its place, or it is a folder with data.
        yield member if had else member.refusal(Reason.ARCHIVE)


def _records(file: _File, header: Header, search: _Search) -> Iterator[Found]:
    label, site = _label(header, file.place, search)
    frames = (None,) if header.frames is None else search.rules.chosen(header.frames)
    if not search.room.takes(len(frames)):
        yield file.refusal(Reason.SOURCE_FRAMES)
        return
    for frame in frames:
        record = Record(file.path, frame, header.patient, label, site, file.member, file.stamp, header.facts)
        yield replace(record, beside=file.beside, seen=header.seen)


def _label(header: Header, place: str, search: _Search) -> tuple[str | None, str | None]:
    """Return the label and the site of a file."""
    row = search.table.get(place, {})
    said = row.get(search.column) if search.column else header.label
    text = ALL if search.label.kind == "none" else said
    return text or None, row.get("site") or None


def _rows_without_files(folder: Path, search: _Search) -> Iterator[Refusal]:
    """Yield a refusal for each row of the table that names no file; of an archive that is known none can be told.

    Raises:
        IntakeError: No row names a file.
    """
    if not search.column or not search.table:
        return
    known = tuple(f"{path.relative_to(folder).as_posix()}/" for path in search.skipped if is_archive(path))
    rows = [place for place in search.table if place not in search.met and not place.startswith(known)]
    if len(rows) == len(search.table) and search.met:
        raise IntakeError(
            f"None of {len(rows)} rows of {LABELS_FILE} names a file that is there. Give files as folder/file.dcm, "
            "from the folder of the images on, and members of an archive as folder/archive.zip/member."
        )
    path = folder / LABELS_FILE
    missing = Refusal(path, None, Reason.MISSING, stamp_of(path))
    yield from (replace(missing, line=search.lines[place]) for place in rows)


def _missing(path: Path, rules: IntakeRules) -> Iterator[Refusal]:
    """Yield a refusal for each file that a DICOMDIR names and that cannot be had."""
    try:
        for named in named_files(path, rules):
            if isinstance(named, Reason):
                yield Refusal(path, None, named)
    except Refused:  # it is counted as what it is
        return


def _labels_file(folder: Path, label: LabelSource) -> tuple[Mapping[str, Row], Mapping[str, int], str]:
    """Return rows of `labels.csv` and their lines, by file, and the column that holds labels ("" where a tag does)."""
    path = folder / LABELS_FILE
    if not os.path.lexists(path):  # one that is no file is an error: labels would come from somewhere else
        if label.kind == "column":
            raise IntakeError(f"--label column:{label.name} needs {LABELS_FILE} (file, {label.name}) beside the DICOM.")
        return {}, {}, ""
    table = read_table(path, LABELS_FILE)
    file = table.column("file")
    names = [PurePosixPath(row[file]).as_posix() for row in table.rows]
    by_file = dict(zip(names, table.rows, strict=True))
    if len(by_file) != len(table.rows):
        raise IntakeError(f"{LABELS_FILE} names a file more than once. Keep one row for each file.")
    column = table.column(label.name or "label") if label.kind in ("auto", "column") else ""
    return by_file, dict(zip(names, table.lines, strict=True)), column
