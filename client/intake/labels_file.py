"""`labels.csv` beside DICOM files: what it says of each file, and which of its rows name none.

`file` is relative to the folder, of a member `ARCHIVE.zip/MEMBER`. Out of scope: labels from tags
(client/intake/labels).
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from client.intake.records import LabelSource, Refusal, stamp_of
from client.intake.refusals import Reason
from client.intake.table import Row, normal, read_table, spelled_here
from common.errors import IntakeError

LABELS_FILE = "labels.csv"


@final
@dataclass(frozen=True)
class LabelsFile:
    """What the table says. Its repr shows nothing.

    Attributes:
        rows: By file.
        lines: Of each file, the line of its row.
        column: That holds labels; "" where a tag does.
        beside: What it says of each file; of an archive, of all its members in turn.
    """

    rows: Mapping[str, Row] = field(repr=False, default_factory=dict[str, Row])
    lines: Mapping[str, int] = field(repr=False, default_factory=dict[str, int])
    column: str = ""
    beside: Mapping[str, str] = field(repr=False, default_factory=dict[str, str])

    def of(self, place: str) -> str:
        """Return what the table says of a file; also of one that it does not name, which else has its tag's label."""
        return self.beside.get(place, "no row" if self.column else "")

    def without_files(self, folder: Path, met: Set[str], unopened: Iterable[Path]) -> Iterator[Refusal]:
        """Yield a refusal for each row that names no file; of archives that were not opened none can be told.

        Raises:
            IntakeError: No row names a file.
        """
        if not self.column or not self.rows:
            return
        known = tuple(f"{path.relative_to(folder).as_posix()}/" for path in unopened)
        rows = [place for place in self.rows if place not in met and not place.startswith(known)]
        if len(rows) == len(self.rows) and met:
            raise IntakeError(
                f"None of {len(rows)} rows of {LABELS_FILE} names a file that is there. Give files as folder/file.dcm, "
                "from the folder of the images on, and members of an archive as folder/archive.zip/member."
            )
        path = folder / LABELS_FILE
        missing = Refusal(path, None, Reason.MISSING, stamp_of(path))
        yield from (replace(missing, line=self.lines[place]) for place in rows)


def read_labels_file(folder: Path, label: LabelSource) -> LabelsFile:
    """Read the table of a folder; an empty one where there is none.

    Raises:
        IntakeError: It cannot be read, names a file twice, or labels are asked of it and it is not there.
    """
    path = folder / LABELS_FILE
    asked = label.kind in ("auto", "column")
    # One that is no file is an error where labels are asked of it: they would come from somewhere else.
    if not (os.path.lexists if asked else os.path.isfile)(path):
        if label.kind == "column":
            raise IntakeError(f"--label column:{label.name} needs {LABELS_FILE} (file, {label.name}) beside the DICOM.")
        return LabelsFile()
    table = read_table(path, LABELS_FILE)
    file = table.column("file")
    names = [_place(folder, row[file]) for row in table.rows]
    by_file = dict(zip(names, table.rows, strict=True))
    if len(by_file) != len(table.rows):
        raise IntakeError(f"{LABELS_FILE} names a file more than once. Keep one row for each file.")
    column = table.column(label.name or "label") if asked else ""
    return LabelsFile(by_file, dict(zip(names, table.lines, strict=True)), column, _beside(by_file, column))


def members_places(archive: str, members: Iterable[str]) -> Mapping[str, str]:
    """Return how the table names the members of an archive: with slashes, unless another one has that name."""
    names = frozenset(members)
    slashed = {name: name.replace("\\", "/") for name in names}
    return {name: f"{archive}/{name if other in names else other}" for name, other in slashed.items()}


def _place(folder: Path, name: str) -> str:
    end = _end_of_archive(name)
    return normal(spelled_here(folder, name[:end]) + name[end:].replace("\\", "/"))


def _end_of_archive(name: str) -> int:
    end = name.lower().find(".zip/")
    return len(name) if end < 0 else end + 4


def _beside(rows: Mapping[str, Row], column: str) -> Mapping[str, str]:
    texts: dict[str, list[str]] = {}
    for place, row in rows.items() if column else ():
        texts.setdefault(place[: _end_of_archive(place)], []).append(f"{place}={row.get(column, '')}")
    return {place: "\n".join(lines) for place, lines in texts.items()}
