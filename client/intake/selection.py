"""Which of the images that a scan found are used, whose they are, and what of them is made black.

Out of scope: finding them (client/intake/sources), decoding them (client/intake/decode).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, final

from client.intake.deidentify import BlankRules, doubt
from client.intake.labels import MAX_RULES_BYTES
from client.intake.patients import Patient, PatientTable, readable
from client.intake.records import Record, Refusal, Scan, parse_label
from client.intake.refusals import Reason
from client.intake.rules import IntakeRules
from client.logs import printable
from client.policy import Doubtful
from common.files import read_bounded
from common.wording import counted

_SHOWN, _SHOWN_CHARS = 8, 48
"""Labels that are shown, and characters of each."""
_READING = 3
"""Raised by a release that makes other pixels, or another patient, of the same file: imported images are read again."""


@final
@dataclass(frozen=True)
class Practice:
    """How a site reads its images: all that decides which are used and what their pixels are.

    Attributes:
        source: The folder or file.
        label: As `scan` takes it.
        rules: How pixels are read.
        allowed: Kinds of images with doubtful text that are used.
        blank: Which parts are made black.
        patients: Which patients are in truth another.
    """

    source: Path = field(repr=False)
    label: str = "auto"
    rules: IntakeRules = field(default_factory=IntakeRules)
    allowed: tuple[Doubtful, ...] = ()
    blank: BlankRules = field(default_factory=BlankRules)
    patients: PatientTable = field(default_factory=PatientTable)

    def digest(self) -> str:
        """Return a digest of all that decides pixels, labels and patients, beside the files themselves."""
        label = parse_label(self.label)
        label_rules = (
            read_bounded(Path(label.name), MAX_RULES_BYTES).decode(errors="replace") if label.kind == "rules" else ""
        )
        rules = self.rules.model_dump(exclude={"workers", "decode_seconds"})
        merged = [sorted(self.patients.merged.items()), sorted(self.patients.by_id.items())]
        said = [_READING, self.label, label_rules, rules, sorted(self.allowed), self.blank.model_dump(), merged]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


@final
@dataclass(frozen=True)
class Choice:
    """What is to be decoded, and what is not used. Its repr shows nothing.

    Attributes:
        records: In the order of patients, by (issuer, id); each with its patient as normalised and corrected.
        refusals: Those of the scan and the ones made here.
        uncounted: Refusals that the scan only counted, by reason.
        copies: Refused as the same image as another of the scan; used where that one does not decode.
        shared: Pairs of records of one image under two patients; of an image that is in use already, its own twice.
    """

    records: tuple[Record, ...] = field(repr=False)
    refusals: tuple[Refusal, ...] = field(repr=False)
    uncounted: tuple[tuple[str, int], ...] = field(repr=False)
    copies: tuple[Record, ...] = field(default=(), repr=False)
    shared: tuple[tuple[Record, Record], ...] = field(default=(), repr=False)


@final
@dataclass(slots=True)
class _First:
    """The first record of an image or instance, and whether one of them is used."""

    record: Record
    used: bool = False


class InUse(Protocol):
    """DICOM instances that are in use already."""

    def __contains__(self, name: object, /) -> bool:
        """Return whether an instance is."""
        ...

    def of_another(self, name: str, patient: Patient, /) -> bool:
        """Return whether it is, for another patient than this one."""
        ...


def choose(found: Scan, practice: Practice, classes: Sequence[str] | None, instances: InUse | None = None) -> Choice:
    """Decide about each image from its header.

    Args:
        found: From `scan` by the same practice.
        practice: The site's.
        classes: Those of a run; None: any label will do.
        instances: DICOM instances that are in use already.

    Guarantees:
        - an_instance_once: Of images with one SOP instance, or that are one image of one file, the first is used; by
          `other_copies` the first of the instance that decodes.
        - accounted: Every record is either chosen or refused with one reason.
        - mangled_ids_merge_nobody: An image whose patient's id or issuer lost letters in decoding is not used.
        - text_before_labels: An image that may show text is refused for that, labelled or not.
        - patients_adjacent: Records come by (issuer, id) of their patient, one patient's together.
    """
    ranks = practice.patients.ranks(record.patient for record in found.records)
    chosen: list[Record] = []
    refusals = list(found.refusals)
    copies: list[Record] = []
    shared: list[tuple[Record, Record]] = []
    met: dict[object, _First] = {}
    patients = {stated: practice.patients.of(stated) for stated in ranks}
    for record in found.records:
        reason = _reason(record, practice, classes)
        patient, blank, name = patients[record.patient], practice.blank.regions(record), instance_of(record)
        before = [met.setdefault(name, _First(record)) for name in _names(record)]
        # Used or not: both ids are one person's.
        if others := [one.record for one in before if patients[one.record.patient] != patient]:
            shared.append((others[0], record))
        elif instances is not None and name and instances.of_another(name, patient):
            shared.append((record, record))
        if reason is None:
            if not before[0].used and before[-1].used:
                copies.append(replace(record, patient=patient, blank=blank))
            if any(one.used for one in before) or (instances is not None and name in instances):
                reason = Reason.DUPLICATE
            for one in before:
                one.used = True
        if reason is not None:
            refusals.append(record.refused(str(reason)))
            continue
        chosen.append(replace(record, patient=patient, blank=blank))
    by_rank = {patients[stated]: rank for stated, rank in ranks.items()}
    chosen.sort(key=lambda record: by_rank[record.patient])
    counted: dict[str, int] = {}
    for refusal in found.refusals:
        counted[refusal.reason] = counted.get(refusal.reason, 0) + 1
    rest = {reason: count - counted.get(reason, 0) for reason, count in found.refused.items()}
    uncounted = tuple((reason, count) for reason, count in rest.items() if count > 0)
    return Choice(tuple(chosen), tuple(refusals), uncounted, tuple(copies), tuple(shared))


def other_copies(choice: Choice, lost: Iterable[Record]) -> tuple[Choice, tuple[Record, ...]]:
    """Choose for each image that did not decode another copy of the same instance, where there is one.

    Returns:
        What is chosen then, and the copies.
    """
    wanted = {name for record in lost if (name := instance_of(record))}
    if not wanted or not choice.copies:
        return choice, ()
    first: dict[str, Record] = {}
    rest: list[Record] = []
    for copy in choice.copies:
        name = instance_of(copy)
        if name in wanted and name not in first:
            first[name] = copy
        else:
            rest.append(copy)
    taken = Counter((copy.path, copy.member) for copy in first.values())
    refusals: list[Refusal] = []
    for refusal in choice.refusals:
        place = (refusal.path, refusal.member)
        if refusal.reason == Reason.DUPLICATE and taken[place]:
            taken[place] -= 1
        else:
            refusals.append(refusal)
    copies = tuple(first.values())
    chosen = replace(choice, records=(*choice.records, *copies), refusals=tuple(refusals), copies=tuple(rest))
    return chosen, copies


def other_labels(found: Scan, classes: Sequence[str], show: bool) -> str:
    """Say that labels are no class of a run, with counts; empty where every label is a class.

    Args:
        found: The scan.
        classes: Of the run.
        show: Name the labels: for the terminal of whoever imports, and nothing else, since they are values of headers.
    """
    others = Counter(record.label for record in found.records if record.label not in (None, *classes))
    if not others:
        return ""
    return (
        f"{counted(others.total(), 'image has a label that is', 'images have labels that are')} no class of the run: "
        f"{shown_labels(others, show)}. Spelling and capitals "
        "count: if one of these is meant, run again with --classes as the labels are spelled, or map them with rules."
    )


def shown_labels(labels: Mapping[str | None, int] | Mapping[str, int], show: bool) -> str:
    """Return the most frequent labels with their counts, cut and printable; not shown, only how many there are."""
    if not show:
        return f"{counted(len(labels), 'label')}, shown on a terminal alone or with --show-files"
    named = ", ".join(
        f"{printable(str(label))[:_SHOWN_CHARS]} {count}" for label, count in Counter(labels).most_common(_SHOWN)
    )
    return named + (f" and {len(labels) - _SHOWN} labels more" if len(labels) > _SHOWN else "")


def of_headers(found: Scan, practice: Practice) -> bool:
    """Return whether labels are values of DICOM headers, and not of a table, an array or rules of the site."""
    kind = parse_label(practice.label).kind
    return kind in ("auto", "tag") and any(
        record.label is not None and "TransferSyntaxUID" in record.header and not record.beside
        for record in found.records
    )


def instance_of(record: Record) -> str:
    """Return what names a DICOM image wherever its file stands; "" where the header does not say."""
    sop = record.header.get("SOPInstanceUID", "")
    return f"{sop}#{record.frame}" if sop else ""


def _reason(record: Record, practice: Practice, classes: Sequence[str] | None) -> Reason | None:
    if not readable(record.patient):
        return Reason.PATIENT_UNREADABLE
    if (doubtful := doubt(record, practice.allowed)) is not None:  # first: it tells whoever looks before labelling
        return doubtful
    if record.label is None:
        return Reason.NO_LABEL
    return Reason.OTHER_LABEL if classes is not None and record.label not in classes else None


def _names(record: Record) -> list[object]:
    image = (record.path, record.member, record.frame)
    return [image, instance] if (instance := instance_of(record)) else [image]
