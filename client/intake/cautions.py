"""Warnings about patients' ids: what makes it likely that one person is there twice, or that many are one.

Grouping is a privacy parameter: the guarantee is per patient as grouped here. None of this refuses an image.
Out of scope: how ids are normalised and corrected (client/intake/patients).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from client.intake.records import Record, Refusal, Region
from client.intake.refusals import Reason
from client.intake.requests import is_npz
from client.intake.selection import Choice, Practice
from common.wording import counted

GROUPING = (
    "Grouping is a privacy parameter: the guarantee holds for each (issuer, id) as counted here. For a person under "
    "two ids epsilon is twice as large; a table of patients (`patients` in site.toml) merges them."
)
MANY_IMAGES = 2000
"""Under one id: more than a person has."""
_FEW = 20
_LINES = 10
"""Of a table that are named."""


@final
@dataclass(frozen=True)
class Caution:
    """One warning: what, without naming anybody, and files to look at."""

    said: str
    files: tuple[Path | Record | Refusal, ...] = field(default=(), repr=False)


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
        - black_by_rule, rows_as_people, accession_like, several_birth_dates_or_sexes, thousands_under_one_id,
          same_instance_twice, same_instance_under_two_patients, several_issuers: Each is warned of where it is so, and
          not where it is not.
    """
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[practice.patients.of(record.patient)].append(record)
    found = [*_contradictions(groups), *_issuers(groups)]
    if not partial:
        found = [*_examinations(groups), *found, *_sizes(groups)]
    if twice := [refusal for refusal in choice.refusals if refusal.reason == Reason.DUPLICATE]:
        said = f"{counted(len(twice), 'image is', 'images are')} there a second time; the second is not used."
        found.append(Caution(said, tuple(twice)))
    found += [*_shared(choice), *_black(choice.records), *_rows_as_people(records)]
    if not partial and (unused := practice.patients.unused(record.patient for record in records)):
        lines = ", ".join(map(str, unused[:_LINES])) + (", ..." if len(unused) > _LINES else "")
        said = f"{counted(len(unused), 'line')} of the table of patients: nobody of that id is there (line {lines})."
        found.append(Caution(said))
    if partial:
        found = [replace(one, said=f"Of the files that were opened now: {one.said}") for one in found]
    return found


def _shared(choice: Choice) -> list[Caution]:
    """Warn of one image under two patients: a copy that is not decoded never reaches the look for twins."""
    said = "under two patients: one person with two ids? If so merge them (`patients` in site.toml)."
    files = tuple({id(one): one for pair in choice.shared for one in pair}.values())
    return [Caution(f"{counted(len(choice.shared), 'image is', 'images are')} there {said}", files)] if files else []


def _black(records: Sequence[Record]) -> list[Caution]:
    """Warn of images of which a rule of regions leaves nothing: it was written for larger ones, or is wrong."""
    seen: dict[tuple[tuple[Region, ...], tuple[int, int]], bool] = {}
    black: list[Record] = []
    for record in records:
        if record.blank and (size := record.stated_size) is not None:
            key = record.blank, size
            if key not in seen:
                seen[key] = _covers(*key)
            if seen[key]:
                black.append(record)
    said = "the regions of blank_rules cover them whole, and they are learned as black: mend the rule."
    return [Caution(f"{counted(len(black), 'image')}: {said}", tuple(black))] if black else []


def _covers(regions: tuple[Region, ...], size: tuple[int, int]) -> bool:
    """Return whether regions together cover an image: every cell between their edges lies in one of them."""
    columns, rows = size
    across = sorted({0, *(x for left, _, width, _ in regions for x in (left, left + width) if x < columns)})
    down = sorted({0, *(y for _, top, _, height in regions for y in (top, top + height) if y < rows)})
    return all(
        any(left <= x < left + width and top <= y < top + height for left, top, width, height in regions)
        for x in across
        for y in down
    )


def _rows_as_people(records: Sequence[Record]) -> list[Caution]:
    of_rows = all(is_npz(record.path) and record.patient == ("", str(record.frame)) for record in records)
    said = "Each image counts as a person: the ids are the numbers of the rows. MNIST's form names nobody."
    return [Caution(said)] if records and of_rows else []


Groups = dict[tuple[str, str], list[Record]]


def _examinations(groups: Groups) -> list[Caution]:
    equal = [
        records[0].path
        for (_, name), records in groups.items()
        if any(name == records[0].header.get(key, "").casefold() for key in ("AccessionNumber", "StudyInstanceUID"))
    ]
    found: list[Caution] = []
    if equal:
        some = f"{len(equal)} of {counted(len(groups), 'id')} {'is' if len(equal) == 1 else 'are'}"
        said = f"{some} the number of an examination: visits, not people?"
        found.append(Caution(said, tuple(equal)))
    studies = [len({record.header.get("StudyInstanceUID") for record in records}) for records in groups.values()]
    stated = any("StudyInstanceUID" in records[0].header for records in groups.values())
    if len(groups) >= _FEW and stated and max(studies) == 1:
        found.append(Caution(f"None of {len(groups)} ids has a second examination: visits, not people?"))
    return found


def _contradictions(groups: Groups) -> list[Caution]:
    found: list[Caution] = []
    for keyword, name in (("PatientBirthDate", "birth date"), ("PatientSex", "sex")):
        several = [
            records[0].path
            for records in groups.values()
            if len({record.header[keyword] for record in records if keyword in record.header}) > 1
        ]
        if several:
            ids = counted(len(several), "id has", "ids have")
            said = f"{ids} more than one {name}: different people, or a wrong entry."
            found.append(Caution(said, tuple(several)))
    return found


def _sizes(groups: Groups) -> list[Caution]:
    large = [records[0].path for records in groups.values() if len(records) > MANY_IMAGES]
    said = f"{counted(len(large), 'id has', 'ids have')} over {MANY_IMAGES} images: one id for many?"
    found = [Caution(said, tuple(large))] if large else []
    if len(groups) == 1 and len(next(iter(groups.values()))) > _FEW:
        found.append(Caution("All images have one id: it was blanked or replaced when they were exported."))
    return found


def _issuers(groups: Groups) -> list[Caution]:
    issuers = Counter(name for _, name in groups)
    several = {name for name, count in issuers.items() if count > 1}
    files = tuple(records[0].path for (_, name), records in groups.items() if name in several)
    if not several:
        return []
    ids = counted(len(several), "id comes", "ids come")
    return [Caution(f"{ids} with more than one issuer, or with and without: the same people?", files)]
