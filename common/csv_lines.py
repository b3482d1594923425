"""The lines of a CSV file with their numbers, or what is wrong with it. Out of scope: what they mean."""

import csv
import io

from common.errors import IntakeError

_EXCEL = "in Excel: Save as, CSV UTF-8 with commas; or replace them"


def read_lines(data: bytes, what: str) -> list[tuple[int, list[str]]]:
    """Return the lines that are not empty, the header first.

    Args:
        data: The file.
        what: How messages call it.

    Raises:
        IntakeError: It is not UTF-8, not CSV, or separated by something else than commas. No content is quoted.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise IntakeError(f"{what} is not UTF-8 text. Save it again as CSV UTF-8.") from None
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error:  # it quotes the file
        raise IntakeError(f"{what} is not CSV: expected values with commas between them and a header.") from None
    if lines and len(lines[0][1]) == 1:
        for mark, name in ((";", "semicolons"), ("\t", "tabs")):
            if mark in lines[0][1][0]:
                raise IntakeError(f"{what} has {name} between its values, expected commas ({_EXCEL}).")
    return lines
