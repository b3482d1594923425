"""Who is the same patient: (issuer, PatientID), normalised, and corrected by a table of the site.

Privacy is promised to each patient as a whole, so a patient under two ids breaks the promise, while two patients under
one id only share what one may contribute. Hence ids are brought together generously: characters of one meaning (NFKC),
capitals and spaces at the ends or doubled do not tell two patients apart.

The table is a CSV file with the columns `patient` and `to` and, if wanted, `issuer` and `to_issuer`: the images of
`patient` count as those of `to`. Out of scope: warnings about ids (client/intake/warnings).
"""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from client.intake.table import read_table
from common.errors import IntakeError

Patient = tuple[str, str]
"""Issuer and id, as the file states them or normalised."""


def normalised(patient: Patient) -> Patient:
    """Return what tells patients apart.

    Guarantees:
        - spelling_does_not_split: Capitals, spaces and forms of one character do not make two patients of one.

    >>> normalised(("Ward", " ab  12 "))
    ('ward', 'ab 12')
    """
    issuer, name = (" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in patient)
    return issuer, name


@final
@dataclass(frozen=True)
class PatientTable:
    """Which patients are in truth another. Its repr shows nothing."""

    merged: Mapping[Patient, Patient] = field(default_factory=dict[Patient, Patient], repr=False)

    def of(self, stated: Patient) -> Patient:
        """Return who a patient is."""
        patient = normalised(stated)
        return self.merged.get(patient, patient)

    def ranks(self, stated: Iterable[Patient]) -> Mapping[Patient, int]:
        """Return the place of each patient as stated: by (issuer, id), one patient's spellings together."""
        numbers: dict[Patient, int] = {}
        return {patient: numbers.setdefault(self.of(patient), len(numbers)) for patient in sorted(set(stated))}

    def unused(self, stated: Iterable[Patient]) -> int:
        """Return how many lines name a patient who is not there."""
        return len(set(self.merged) - {normalised(patient) for patient in stated})


def read_patient_table(path: Path) -> PatientTable:
    """Read a table that merges or corrects patients.

    Raises:
        IntakeError: It cannot be read, lacks a column, gives one patient two meanings, or a chain of them.
    """
    table = read_table(path, f"The table of patients {path}")
    for name in ("patient", "to"):
        if name not in table.columns:
            raise IntakeError(
                f"The table of patients has no column {name!r}, expected patient, to (issuer, to_issuer)."
            )
    merged: dict[Patient, Patient] = {}
    for number, row in enumerate(table.rows, 2):
        here = normalised((row.get("issuer", ""), row["patient"]))
        there = normalised((row.get("to_issuer", row.get("issuer", "")), row["to"]))
        if not here[1] or not there[1] or merged.get(here, there) != there:
            raise IntakeError(f"Line {number} of the table of patients has no id, or gives one patient two meanings.")
        merged[here] = there
    if any(merged.get(there, there) != there for there in merged.values()):
        raise IntakeError("A patient of the column `to` is another patient by another line. Name the last one in both.")
    return PatientTable(merged)
