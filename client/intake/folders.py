"""Where DICOM files stand: a folder tree, zip archives in it or alone, or what a DICOMDIR names. Headers only.

A tree is walked whole; files that a DICOMDIR in it names and that are not there are counted. Labels come from tags, or
from `labels.csv` (client/intake/labels_file).
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from pydicom.datadict import tag_for_keyword

from client.intake.archives import Archive
from client.intake.directory import named_files
from client.intake.isolation import DecoderPool
from client.intake.labels import Labelling, TagLabel, read_label_rules
from client.intake.labels_file import LABELS_FILE, LabelsFile, members_places, read_labels_file
from client.intake.records import (
    ALL,
    NOTHING_KNOWN,
    Header,
    Known,
    LabelSource,
    Record,
    Refusal,
    Room,
    Scan,
    Stamp,
    scan_of,
    stamp_of,
)
from client.intake.refusals import Reason, Refused
from client.intake.requests import Asked, ask_header
from client.intake.rules import IntakeRules
from client.paths import INCOMING
from common.errors import ConfigError, IntakeError

AUTO_TAG = "AdmittingDiagnosesDescription"
_LINK_TO_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

Found = Refusal | tuple[Record, Sequence[int | None]]
"""A refusal, or the first image of a file and which of its frames are asked."""


@final
@dataclass(frozen=True)
class _Search:
    """What one scan looks for, and what it has met."""

    rules: IntakeRules
    label: LabelSource
    labels: Labelling
    table: LabelsFile
    known: Known
    skipped: list[Path] = field(default_factory=list[Path], repr=False)
    met: set[str] = field(default_factory=set[str], repr=False)


def scan_folder(folder: Path, label: LabelSource, rules: IntakeRules, known: Known = NOTHING_KNOWN) -> Scan:
    """List the images of all DICOM files below a folder, from their headers.

    Raises:
        IntakeError: `labels.csv` is needed and missing, or cannot be read.
        ConfigError: The label's tag is not a DICOM keyword.
    """
    return _scan(walk(folder), folder, _search(folder, label, rules, known), in_tree=True)


def scan_file(path: Path, label: LabelSource, rules: IntakeRules, known: Known = NOTHING_KNOWN) -> Scan:
    """List the images of one file: a zip archive, or a DICOM file.

    Raises:
        IntakeError, ConfigError: As in `scan_folder`.
    """
    return _scan([path], path.parent, _search(path.parent, label, rules, known))


def scan_directory(path: Path, label: LabelSource, rules: IntakeRules, known: Known = NOTHING_KNOWN) -> Scan:
    """List the images of the files that a DICOMDIR names.

    Raises:
        IntakeError, ConfigError: As in `scan_folder`; also where the DICOMDIR itself cannot be read.
    """
    search = _search(path.parent, label, rules, known)
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


def _search(folder: Path, label: LabelSource, rules: IntakeRules, known: Known) -> _Search:
    table = read_labels_file(folder, label)
    of_tags = label.kind == "auto" and not table.column
    labels: Labelling = TagLabel(tag=label.name if label.kind == "tag" else AUTO_TAG if of_tags else "")
    if label.kind == "rules":
        labels = read_label_rules(Path(label.name))
    for keyword in labels.tags():
        if tag_for_keyword(keyword) is None:
            raise ConfigError(f"Expected DICOM keywords such as {AUTO_TAG} to read labels from, got {keyword!r}.")
    return _Search(rules, label, labels, table, known)


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
            found.extend([item.refusal(header) if isinstance(header, str) else _images(item, header, search)])
            if in_tree and item.member is None and header == Reason.INDEX:
                found.extend(_missing(item.path, search.rules))
    found += [item for item in items if isinstance(item, Refusal)]
    archives = filter(is_archive, search.skipped)
    found.extend(search.table.without_files(folder, search.met, archives))
    return _with_frames(found, search)


def _with_frames(found: Sequence[Found], search: _Search) -> Scan:
    """List all frames of what was found, as far as the files that are known already leave room for them.

    Only now is it known which these are: what a scan lists does not depend on what the last one did.
    """
    files = [item[0] for item in found if not isinstance(item, Refusal)]
    refusals = [item for item in found if isinstance(item, Refusal)]
    room = Room(search.known.frames(scan_of(files, refusals, search.skipped)))
    records: list[Record] = []
    refusals = []
    for item in found:
        if isinstance(item, Refusal):
            refusals.append(item)
        elif room.takes(len(item[1])):
            records.extend(replace(item[0], frame=frame) for frame in item[1])
        else:
            refusals.append(replace(item[0].refused(Reason.SOURCE_FRAMES), frame=None))
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
    file = _File(path, place, stamp_of(path), search.table.of(place))
    if search.known.skip(path, file.stamp, file.beside):
        search.skipped.append(path)
    elif not is_archive(path):
        yield file
    else:
        for member in _members(file):
            search.met.add(member.place if isinstance(member, _File) else f"{place}/{member.member}")
            yield member


def _members(file: _File) -> Iterator[_File | Refusal]:
    try:
        with Archive(file.path) as archive:
            members = archive.members()
    except Refused as refusal:
        yield file.refusal(refusal.reason)
        return
    places = members_places(file.place, (name for name, _ in members))
    for name, had in members:
        member = replace(file, place=places[name], member=name)
        # If not, another member has this name and would be read in its place, or it is a folder with data.
        yield member if had else member.refusal(Reason.ARCHIVE)


def _images(file: _File, header: Header, search: _Search) -> tuple[Record, Sequence[int | None]]:
    label, site = _label(header, file.place, search)
    frames = (None,) if header.frames is None else search.rules.chosen(header.frames)
    record = Record(file.path, frames[0], header.patient, label, site, file.member, file.stamp, header.facts)
    return replace(record, beside=file.beside, seen=header.seen), frames


def _label(header: Header, place: str, search: _Search) -> tuple[str | None, str | None]:
    """Return the label and the site of a file."""
    row = search.table.rows.get(place, {})
    said = row.get(search.table.column) if search.table.column else header.label
    text = ALL if search.label.kind == "none" else said
    return text or None, row.get("site") or None


def _missing(path: Path, rules: IntakeRules) -> Iterator[Refusal]:
    """Yield a refusal for each file that a DICOMDIR names and that cannot be had."""
    try:
        for named in named_files(path, rules):
            if isinstance(named, Reason):
                yield Refusal(path, None, named)
    except Refused:  # it is counted as what it is
        return
