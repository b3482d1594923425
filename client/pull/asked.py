"""The list of what is asked for: a CSV with accession numbers or patients. Out of scope: asking for it.

Source: PS3.4 C.2.2.2 (wild cards, lists and universal matching, none of which a list may ask for); PS3.5 6.2 (SH, LO).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import final

from common.csv_lines import read_lines
from common.errors import FedmedganError, IntakeError
from common.files import read_bounded

MAX_LIST_BYTES = 16 << 20
MAX_ROWS = 100_000
COLUMNS = frozenset({"accession", "patient", "issuer", "modality", "from", "to"})
_PLAIN = re.compile(r"[ -\[\]-~]*")  # ASCII without control characters and backslash, which makes a list
_MODALITY = re.compile(r"[A-Z0-9_]{1,16}")
_DATE = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)")
_LENGTHS = {"accession": 16, "patient": 64, "issuer": 64}


@final
@dataclass(frozen=True)
class Row:
    """One line of the list. Its repr shows the line's number only.

    Attributes:
        line: The line's number in the file; the header is line 1.
        accession: The accession number, or empty where the patient is named.
        patient: The patient's id, or empty.
        issuer: Who issued that id, or empty.
        modality: Series of this modality only, or empty for all.
        begin: Studies of this day and later only, or None.
        end: Studies of this day and earlier only, or None.
    """

    line: int
    accession: str = field(default="", repr=False)
    patient: str = field(default="", repr=False)
    issuer: str = field(default="", repr=False)
    modality: str = field(default="", repr=False)
    begin: date | None = field(default=None, repr=False)
    end: date | None = field(default=None, repr=False)

    @property
    def shown(self) -> str:
        """Return what `--show-ids` shows."""
        return self.accession or self.patient

    @property
    def dates(self) -> str:
        """Return the range of days as DICOM writes it; empty for all days."""
        if self.begin is None and self.end is None:
            return ""
        return "-".join(day.strftime("%Y%m%d") if day else "" for day in (self.begin, self.end))


def read_list(path: Path) -> tuple[Row, ...]:
    """Read a list: a CSV with a header and the column `accession` or `patient`.

    Returns:
        Its rows; of two that ask for the same the first.

    Raises:
        IntakeError: It cannot be read, a column is unknown, or a value is out of bounds; the line is named, its
            content is not.

    Guarantees:
        - asks_for_no_more: Empty values, wild cards (`*`, `?`) and lists, which would ask for other patients too, are
          refused.
        - no_content_in_messages: A message names lines and columns, never a value.
    """
    try:
        data = read_bounded(path, MAX_LIST_BYTES)
    except FedmedganError as error:
        raise IntakeError(f"The list: {error}") from None
    lines = [(number, line) for number, line in read_lines(data, f"The list {path}") if any(map(str.strip, line))]
    columns = [name.strip().lower() for name in lines[0][1]] if lines else []
    _check_columns(columns)
    if len(lines) < 2:
        raise IntakeError(f"The list {path} has no line below its header. Write one for each examination or patient.")
    if len(lines) > MAX_ROWS + 1:
        raise IntakeError(f"Expected at most {MAX_ROWS} lines below the list's header, got {len(lines) - 1}. Split it.")
    rows: dict[tuple[object, ...], Row] = {}
    for number, line in lines[1:]:
        row = _row(number, columns, line)
        rows.setdefault(_without_line(row), row)
    return tuple(rows.values())


def _check_columns(columns: Sequence[str]) -> None:
    unknown = [number for number, name in enumerate(columns, 1) if name not in COLUMNS]
    both = {"accession", "patient"} & set(columns)
    if (
        unknown
        or len(both) != 1
        or len(set(columns)) != len(columns)
        or ("issuer" in columns and "patient" not in both)
    ):
        raise IntakeError(
            "Expected the list's header to name the column accession or patient (then also issuer, if wanted), and of "
            f"modality, from, to what is wanted; each once. Unknown columns: {unknown or 'none'}."
        )


def _row(number: int, columns: Sequence[str], line: Sequence[str]) -> Row:
    if len(line) != len(columns):
        raise IntakeError(f"Line {number} of the list has {len(line)} values, the header {len(columns)}. Mend it.")
    values = {name: value.strip() for name, value in zip(columns, line, strict=True)}
    for name, longest in _LENGTHS.items():
        value = values.get(name, "")
        wanted = name in columns and name != "issuer"
        if not _PLAIN.fullmatch(value) or set(value) & set("*?") or len(value) > longest or (wanted and not value):
            raise IntakeError(
                f"Expected in line {number} of the list as {name} 1 to {longest} characters of ASCII without *, ? and "
                "backslash, which would ask for others too. Mend or remove the line."
            )
    modality = values.get("modality", "").upper()
    if modality and not _MODALITY.fullmatch(modality):
        raise IntakeError(f"Expected in line {number} of the list one modality, such as CT, or nothing.")
    begin, end = _day(number, values.get("from", "")), _day(number, values.get("to", ""))
    if begin and end and begin > end:
        raise IntakeError(f"Line {number} of the list ends before it begins. Mend from and to.")
    named = {name: values.get(name, "") for name in _LENGTHS}
    return Row(number, **named, modality=modality, begin=begin, end=end)


def _day(number: int, text: str) -> date | None:
    if not text:
        return None
    found = _DATE.fullmatch(text)
    try:
        return date(*map(int, found.groups())) if found else date.fromisoformat("")
    except ValueError:
        raise IntakeError(f"Expected in line {number} of the list days as YYYY-MM-DD.") from None


def _without_line(row: Row) -> tuple[object, ...]:
    return row.accession, row.patient, row.issuer, row.modality, row.begin, row.end
