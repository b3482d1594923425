"""Who is the same patient: (issuer, PatientID), normalised, and corrected by a table of the site.

Privacy is promised to each patient as a whole, so a patient under two ids breaks the promise, while two patients under
one id only share what one may contribute. Hence ids are brought together generously: characters of one meaning (NFKC),
capitals, letters that nobody sees (Unicode's Cf and Default_Ignorable_Code_Point) and spaces at the ends or doubled do
not tell two patients apart.

The table is a CSV file with the columns `patient` and `to` and, if wanted, `issuer` and `to_issuer`: the images of
`patient` count as those of `to`. A line without an issuer means the patient of that id whatever the issuer, and one
without `to_issuer` too, or with an issuer the patient `to` of the same one. Out of scope: warnings about ids
(client/intake/cautions).
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from client.intake.table import read_table
from common.errors import IntakeError

Patient = tuple[str, str]
"""Issuer and id, as the file states them or normalised."""

_IGNORED = re.compile(
    "[\u034f\u115f-\u1160\u17b4-\u17b5\u180b-\u180f\u2065\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
"""Default_Ignorable_Code_Point of Unicode beyond Cf: joiners, fillers, variation selectors, places reserved for such.

Source: Unicode 14.0 to 16.0, DerivedCoreProperties.txt.
"""


def normalised(patient: Patient) -> Patient:
    """Return what tells patients apart.

    Guarantees:
        - spelling_does_not_split: Capitals, spaces, characters without width and forms of one character do not make two
          patients of one.

    >>> normalised(("Ward", " ab  12 "))
    ('ward', 'ab 12')
    """
    issuer, name = (" ".join(unicodedata.normalize("NFKC", _seen(text)).casefold().split()) for text in patient)
    return issuer, name


def readable(patient: Patient) -> bool:
    """Return whether an id and its issuer kept every letter when they were decoded, and any of the id can be seen.

    Else two of them may look alike.
    """
    return not any("\ufffd" in text for text in patient) and normalised(patient)[1] != ""


def _seen(text: str) -> str:
    """Take characters away that are not shown or only format others: zero-width spaces, byte order marks, fillers."""
    if text.isascii():
        return text
    return "".join(one for one in _IGNORED.sub("", text) if unicodedata.category(one) != "Cf")


@final
@dataclass(frozen=True)
class PatientTable:
    """Which patients are in truth another. Its repr shows nothing.

    Attributes:
        merged: Who is another.
        by_id: The same by id alone, whatever the issuer.
        lines: The line of the table that names a patient, or an id alone.
    """

    merged: Mapping[Patient, Patient] = field(default_factory=dict[Patient, Patient], repr=False)
    by_id: Mapping[str, Patient] = field(default_factory=dict[str, Patient], repr=False)
    lines: Mapping[Patient | str, int] = field(default_factory=dict[Patient | str, int], repr=False)

    def of(self, stated: Patient) -> Patient:
        """Return who a patient is."""
        patient = normalised(stated)
        return self.merged.get(patient) or self.by_id.get(patient[1], patient)

    def ranks(self, stated: Iterable[Patient]) -> Mapping[Patient, int]:
        """Return the place of each patient as stated: by (issuer, id), one patient's spellings together."""
        numbers: dict[Patient, int] = {}
        return {patient: numbers.setdefault(self.of(patient), len(numbers)) for patient in sorted(set(stated))}

    def unused(self, stated: Iterable[Patient]) -> list[int]:
        """Return the lines that name a patient who is not there."""
        there = {normalised(patient) for patient in stated}
        met: set[Patient | str] = {*there, *(name for _, name in there)}
        return sorted(line for named, line in self.lines.items() if named not in met)


def read_patient_table(path: Path) -> PatientTable:
    """Read a table that merges or corrects patients.

    Raises:
        IntakeError: It cannot be read, lacks a column, gives one patient two meanings, or a chain of them.

    Guarantees:
        - any_issuer: A line without an issuer takes the patient of that id whatever the issuer.
        - one_meaning: Two lines that could both be meant and say two things are an error.
    """
    table = read_table(path, f"The table of patients {path}")
    for name in ("patient", "to"):
        if name not in table.columns:
            raise IntakeError(
                f"The table of patients has no column {name!r}, expected patient, to (issuer, to_issuer)."
            )
    merged: dict[Patient, Patient] = {}
    by_id: dict[str, Patient] = {}
    lines: dict[Patient | str, int] = {}
    for number, row in zip(table.lines, table.rows, strict=True):
        issuer, here = normalised((row.get("issuer", ""), row["patient"]))
        to_issuer, to = normalised((row.get("to_issuer", ""), row["to"]))
        there = (to_issuer or issuer, to)
        known = merged.get((issuer, here), there) if issuer else by_id.get(here, there)
        if not here or not to:
            raise IntakeError(f"Line {number} of the table of patients has no id in `patient` or in `to`.")
        if known != there:
            first = lines[(issuer, here) if issuer else here]
            raise IntakeError(
                f"Line {number} of the table of patients says of a patient another thing than line {first}. Remove one."
            )
        lines.setdefault((issuer, here) if issuer else here, number)
        if issuer:
            merged[issuer, here] = there
        else:
            by_id[here] = there
    for there in [there for there in by_id.values() if not there[0]]:  # `to` is then the same whatever the issuer
        by_id.setdefault(there[1], there)
    _require_one_meaning(found := PatientTable(merged, by_id, lines))
    return found


def _require_one_meaning(table: PatientTable) -> None:
    merged, by_id = table.merged, table.by_id
    for named, there in (*merged.items(), *by_id.items()):
        for other, further in ((there, merged.get(there, there)), (there[1], by_id.get(there[1], there))):
            if further != there:
                here, beyond = table.lines.get(named, table.lines[other]), table.lines[other]
                raise IntakeError(
                    f"Line {here} of the table of patients leads to a patient who by line {beyond} is another. Name "
                    "the last one in both."
                )
    for (issuer, name), there in merged.items():
        if by_id.get(name, there) != there:
            raise IntakeError(
                f"Line {table.lines[issuer, name]} of the table of patients is ambiguous: another line names the same "
                "id without an issuer, for another patient. Give both an issuer."
            )
