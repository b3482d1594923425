"""CSV tables beside the images: `index.csv` for PNG/JPEG, `labels.csv` for DICOM. Out of scope: what the rows mean."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import final

from common.csv_lines import read_lines
from common.errors import IntakeError
from common.files import open_regular

MAX_TABLE_BYTES = 256 * 1024**2
MAX_HEADER_BYTES = 64 * 1024
"""Of the line with the names of the columns, where only these are asked."""

Row = Mapping[str, str]


@final
@dataclass(frozen=True)
class Table:
    """A CSV file: lower-case column names, the stripped values of every row and its line. Its repr shows no row."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...] = field(repr=False)
    lines: tuple[int, ...] = field(repr=False)

    def column(self, name: str) -> str:
        """Return the key of a column that must be there.

        Raises:
            IntakeError: There is no such column.
        """
        if name.lower() not in self.columns:
            raise IntakeError(
                f"The CSV file has no column {name!r}. Expected the columns file, patient and label (and, if wanted, "
                "issuer and site) in index.csv beside PNG/JPEG files, or file and label in labels.csv beside DICOM."
            )
        return name.lower()


def read_table(path: Path, what: str = "The CSV file") -> Table:
    """Read a CSV file with a header line.

    Args:
        path: The file.
        what: How messages call it.

    Raises:
        IntakeError: It is not there, no regular file, too large, not UTF-8, not CSV with commas, or two columns have
            one name.

    Guarantees:
        - says_what_is_wrong: What is not there, no regular file, not UTF-8 or separated by semicolons is told as that.
    """
    try:
        with open_regular(path) as handle:
            data = handle.read(MAX_TABLE_BYTES + 1)
    except OSError as error:
        raise IntakeError(f"{what} could not be read: {error.strerror}. Check its name and permissions.") from None
    if len(data) > MAX_TABLE_BYTES:
        raise IntakeError(f"Expected {what} of at most {MAX_TABLE_BYTES} bytes, got more. Split the folder.")
    lines = read_lines(data, what)
    columns = tuple(name.strip().lower() for name in lines[0][1]) if lines else ()
    if len(set(columns)) != len(columns):
        raise IntakeError(f"{what} has two columns of one name (capitals do not count). Rename one.")
    rows = tuple(_row(columns, line) for _, line in lines[1:])
    return Table(columns, rows, tuple(number for number, _ in lines[1:]))


def columns_of(path: Path) -> tuple[str, ...]:
    """Return the column names of a CSV file, and none of what is no CSV file."""
    try:
        with open_regular(path) as handle:
            line = handle.readline(MAX_HEADER_BYTES).decode("utf-8-sig")
        return tuple(name.strip().lower() for name in next(csv.reader([line]), []))
    except (OSError, UnicodeDecodeError, csv.Error):
        return ()


def write_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> bytes:
    """Return a CSV file that `read_table` reads back."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    return text.getvalue().encode()


def spelled_here(root: Path, name: str) -> str:
    """Return a file's name with the slashes of this system, where a table from Windows has the other ones.

    A name that is there as it stands is left alone: here a backslash may be a letter of one.
    """
    if "\\" not in name or "\0" in name:
        return name
    try:
        as_it_stands = (root / name).exists()
    except OSError:
        as_it_stands = False
    return name if as_it_stands else name.replace("\\", "/")


def normal(name: str) -> str:
    """Return one spelling of a file's name, whatever dots and slashes it has."""
    return PurePosixPath(name).as_posix()


def _row(columns: tuple[str, ...], line: list[str]) -> Row:
    values = dict.fromkeys(columns, "")
    values.update({name: value.strip() for name, value in zip(columns, line, strict=False)})
    return values
