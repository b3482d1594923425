"""Warnings about patients' ids: what makes it likely that one person is there twice, or that many are one.

Grouping is a privacy parameter: the guarantee is per patient as grouped here. None of this refuses an image.
Out of scope: how ids are normalised and corrected (client/intake/patients).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from client.intake.records import Record
from client.intake.refusals import Reason
from client.intake.selection import Choice, Practice

GROUPING = (
    "Grouping is a privacy parameter: the guarantee holds for each (issuer, id) as counted here. For a person under "
    "two ids epsilon is twice as large; a table of patients (`patients` in site.toml) merges them."
)
MANY_IMAGES = 2000
"""Under one id: more than a person has."""
_SHARE = 0.1
_FEW = 20
_LINES = 10
"""Of a table that are named."""


@final
@dataclass(frozen=True)
class Caution:
    """One warning: what, without naming anybody, and files to look at."""

    said: str
    files: tuple[Path, ...] = field(default=(), repr=False)


def cautions(records: Sequence[Record], choice: Choice, practice: Practice, partial: bool = False) -> list[Caution]:
    """Return the warnings about the patients of a scan.

    Args:
        records: Of the scan, with patients as the files state them.
        choice: What was made of them.
        practice: The site's.
        partial: Whether files that are used were not opened, so that nothing can be said of the whole.

    Guarantees:
        - nothing_false_of_a_part: Where only some files were opened, each warning says so, and what only the whole can
          show is not said.
        - accession_like, several_birth_dates_or_sexes, thousands_under_one_id, same_instance_twice, several_issuers:
          Each is warned of where it is so, and not where it is not.
    """
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[practice.patients.of(record.patient)].append(record)
    found = [*_contradictions(groups), *_issuers(groups)]
    if not partial:
        found = [*_examinations(groups), *found, *_sizes(groups)]
    if twice := [refusal.path for refusal in choice.refusals if refusal.reason == Reason.DUPLICATE]:
        found.append(Caution(f"{len(twice)} images are there a second time; the second is not used.", tuple(twice)))
    if not partial and (unused := practice.patients.unused(record.patient for record in records)):
        named = ", ".join(map(str, unused[:_LINES])) + (", ..." if len(unused) > _LINES else "")
        found.append(Caution(f"{len(unused)} lines of the table of patients name nobody who is there: line {named}."))
    if partial:
        found = [replace(one, said=f"Of the files that were opened now: {one.said}") for one in found]
        found.append(Caution("Files that were not opened were not looked at for these warnings; `check` looks at all."))
    return found


Groups = dict[tuple[str, str], list[Record]]


def _examinations(groups: Groups) -> list[Caution]:
    equal = [
        records[0].path
        for (_, name), records in groups.items()
        if any(name == records[0].header.get(key, "").casefold() for key in ("AccessionNumber", "StudyInstanceUID"))
    ]
    if len(equal) > _SHARE * len(groups):
        said = f"{len(equal)} of {len(groups)} ids equal the number of an examination: visits, not people?"
        return [Caution(said, tuple(equal))]
    studies = [len({record.header.get("StudyInstanceUID") for record in records}) for records in groups.values()]
    stated = any("StudyInstanceUID" in records[0].header for records in groups.values())
    if len(groups) >= _FEW and stated and max(studies) == 1:
        return [Caution(f"None of {len(groups)} ids has a second examination: visits, not people?")]
    return []


def _contradictions(groups: Groups) -> list[Caution]:
    found: list[Caution] = []
    for keyword, name in (("PatientBirthDate", "birth date"), ("PatientSex", "sex")):
        several = [
            records[0].path
            for records in groups.values()
            if len({record.header[keyword] for record in records if keyword in record.header}) > 1
        ]
        if several:
            said = f"{len(several)} ids have more than one {name}: different people, or a wrong entry."
            found.append(Caution(said, tuple(several)))
    return found


def _sizes(groups: Groups) -> list[Caution]:
    large = [records[0].path for records in groups.values() if len(records) > MANY_IMAGES]
    found = (
        [Caution(f"{len(large)} ids have over {MANY_IMAGES} images: one id for many?", tuple(large))] if large else []
    )
    if len(groups) == 1 and len(next(iter(groups.values()))) > _FEW:
        found.append(Caution("All images have one id: it was blanked or replaced when they were exported."))
    return found


def _issuers(groups: Groups) -> list[Caution]:
    issuers = Counter(name for _, name in groups)
    several = {name for name, count in issuers.items() if count > 1}
    files = tuple(records[0].path for (_, name), records in groups.items() if name in several)
    if not several:
        return []
    return [Caution(f"{len(several)} ids come with more than one issuer, or with and without: the same people?", files)]
