"""Look at a source as an import would, without keeping anything: counts, warnings, and pictures to look at.

Out of scope: how it is shown (client/intake/report, client/intake/page).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from client.intake.cautions import GROUPING, Caution, cautions
from client.intake.decode import decode_records
from client.intake.importing import DECODED, Progress, told_of_files
from client.intake.pixels import Square
from client.intake.records import Record, Refusal, Scan
from client.intake.refusals import at_decoding
from client.intake.report import Listing, Report, make_report
from client.intake.screening import SIDE, can_screen, words_in
from client.intake.selection import Choice, Practice, choose, of_headers, other_copies
from client.intake.sources import find
from client.intake.twins import Twins, counted_pairs

SIZE = 128
"""Pictures are decoded to this size."""
SHOWN = 40
"""Usable pictures on the contact sheet, drawn at random; and at most as many of each other kind."""
SHOWN_OF_A_REASON = 8
"""Pictures that are not used on the contact sheet, of each reason."""
SCREENED = 40
"""Usable pictures that OCR looks at, drawn at random."""


@final
@dataclass(frozen=True)
class Row:
    """Pictures of one kind to look at, each with the number of its file. Its repr shows nothing."""

    title: str
    pictures: tuple[tuple[str, Square], ...] = field(repr=False)


@final
@dataclass(frozen=True)
class Survey:
    """What was found, pictures to look at, and usable images by label, which may be values of headers."""

    report: Report
    found: Scan = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)
    labels: Mapping[str | None, int] = field(repr=False)


def survey(
    practice: Practice,
    classes: Sequence[str] | None = None,
    show_files: bool = False,
    ocr: bool = False,
    progress: Progress | None = None,
) -> Survey:
    """Read everything that an import would read.

    Args:
        practice: The site's.
        classes: Those of a run; None: any label will do.
        show_files: Show files by name, not by number.
        ocr: Look for text in some pictures.
        progress: Told before each file that is listed, and after each image and each picture that OCR looked at.

    Raises:
        UnreadableSource, IntakeError, ConfigError: The source cannot be listed at all.
    """
    found = find(practice.source, practice.label, practice.rules, told_of_files(progress))
    choice = choose(found, practice, classes)
    listing = Listing(found, practice.source if practice.source.is_dir() else practice.source.parent, show_files)
    choice, seen = _decode(choice, practice, progress)
    pairs = [(seen.used[one], seen.used[other]) for one, other in seen.twins.pairs()]
    warnings = [Caution(GROUPING), *cautions(found.records, choice, practice), *_twins(pairs)]
    rows = [Row("usable, drawn at random", tuple(_named(seen.sample, listing)))]
    rows.append(Row("blanked in part", tuple(_named(seen.blanked, listing))))
    rows.append(
        Row(
            "nearly the same under two patients",
            tuple(_named(_pictures([record for pair in pairs[: SHOWN // 4] for record in pair], practice), listing)),
        )
    )
    refused = [refusal.reason for refusal in (*choice.refusals, *seen.lost)]
    counts = Counter(refused) + Counter(dict(choice.uncounted))
    for reason, kept in _not_used(found, choice).items():
        rows.append(Row(f"not used: {reason}", tuple(_named(_pictures(kept, practice), listing))))
    if ocr:
        cautious, row = _screen([record for record, _ in seen.sample[:SCREENED]], practice, listing, progress)
        warnings.append(cautious)
        rows.append(row)
    patients = tuple(Counter(seen.patients).values())
    labels = Counter(record.label for record in seen.used)
    by_class = _by_class(labels, classes, of_headers(found, practice))
    report = make_report(found, choice, seen.lost, patients, by_class, counts, warnings, listing)
    return Survey(report, found, tuple(row for row in rows if row.pictures), labels)


@final
@dataclass(eq=False)
class _Seen:
    """What is kept while pictures come and go: a sample, hashes, counts."""

    twins: Twins = field(default_factory=Twins)
    lost: list[Refusal] = field(default_factory=list[Refusal])
    patients: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    used: list[Record] = field(default_factory=list[Record])
    sample: list[tuple[Record, Square]] = field(default_factory=list[tuple[Record, Square]])
    blanked: list[tuple[Record, Square]] = field(default_factory=list[tuple[Record, Square]])


def _twins(pairs: Sequence[tuple[Record, Record]]) -> list[Caution]:
    said = f"{counted_pairs(len(pairs))} of nearly the same pictures under two patients: one person with two ids?"
    return [Caution(said, tuple(record for pair in pairs for record in pair))] if pairs else []


def _decode(choice: Choice, practice: Practice, progress: Progress | None) -> tuple[Choice, _Seen]:
    seen, numbers, records = _Seen(), dict[tuple[str, str], int](), choice.records
    draw = np.random.default_rng(0)
    while records:
        failed: list[Record] = []
        for done, (record, square) in enumerate(decode_records(records, SIZE, 1, practice.rules), 1):
            if isinstance(square, str):
                seen.lost.append(record.refused(at_decoding(square)))
                failed.append(record)
            else:
                _keep(seen, record, square, numbers.setdefault(record.patient, len(numbers)), draw)
            if progress is not None:
                progress(DECODED, done, len(records))
        choice, records = other_copies(choice, failed)
    return choice, seen


def _keep(seen: _Seen, record: Record, square: Square, patient: int, draw: np.random.Generator) -> None:
    place = len(seen.used)
    seen.twins.add(square, patient, place)
    seen.patients.append(record.patient)
    seen.used.append(replace(record, header={}))
    spot = place if place < SHOWN else int(draw.integers(place + 1))
    if spot < SHOWN:
        seen.sample[spot : spot + 1] = [(record, square)]
    if record.blank and len(seen.blanked) < SHOWN:
        seen.blanked.append((record, square))


def _by_class(labels: Counter[str | None], classes: Sequence[str] | None, of_headers: bool) -> Mapping[str, int] | None:
    """Return the counts by class that a file may hold: a label that is a value of a header only as a class of a run."""
    if classes is not None:
        return {name: labels[name] for name in classes}
    return None if of_headers else {str(label): count for label, count in labels.most_common(SHOWN)}


def _not_used(found: Scan, choice: Choice) -> dict[str, list[Record]]:
    """Return for each reason some records that were readable and are not used, from all over the source."""
    by_reason: dict[str, list[Refusal]] = {}
    for refusal in choice.refusals[len(found.refusals) :]:  # those before have no picture
        by_reason.setdefault(refusal.reason, []).append(refusal)
    wanted: dict[object, list[str]] = {}
    for reason, refusals in by_reason.items():
        count = min(len(refusals), SHOWN_OF_A_REASON)
        for number in range(count):
            wanted.setdefault(_place(refusals[number * len(refusals) // count]), []).append(reason)
    kept: dict[str, list[Record]] = {reason: [] for reason in by_reason}
    for record in found.records:
        if reasons := wanted.get(_place(record)):
            kept[reasons.pop(0)].append(record)
    return kept


def _place(item: Record | Refusal) -> object:
    return item.path, item.member, item.frame, item.line


def _pictures(records: Sequence[Record], practice: Practice, size: int = SIZE) -> list[tuple[Record, Square]]:
    decoded = decode_records(records, size, 1, practice.rules)
    return [(record, square) for record, square in decoded if not isinstance(square, str)]


def _named(pictures: Sequence[tuple[Record, Square]], listing: Listing) -> list[tuple[str, Square]]:
    return [(listing.name(record), square) for record, square in pictures]


def _screen(
    records: Sequence[Record], practice: Practice, listing: Listing, progress: Progress | None
) -> tuple[Caution, Row]:
    if not can_screen():
        return Caution("OCR was asked for, and tesseract is not installed: apt-get install tesseract-ocr"), Row("", ())
    with_text: list[Record] = []
    failed = 0
    pictures = _pictures(records, practice, SIDE)
    for done, (record, square) in enumerate(pictures, 1):
        words = words_in(square)
        if progress is not None:
            progress("pictures looked at by OCR", done, len(pictures))
        failed += words is None
        if words:
            with_text.append(record)
    said = (
        f"OCR found text in {len(with_text)} of {len(records)} usable pictures that it looked at, and failed on "
        f"{failed}. It misses much: look yourself."
    )
    row = Row("usable, with text by OCR", tuple(_named(_pictures(with_text, practice), listing)))
    return Caution(said, tuple(with_text)), row
