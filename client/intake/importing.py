"""From the site's files into a vault: what is new or changed is read, the rest stays, what is gone goes.

A file counts as unchanged while its size, its time of change, what tables beside it say of it and the site's rules are
the same. Not its time of change of status: a backup that is restored, a copy and a link that a backup sets change that,
and all would be decoded anew. An import that is interrupted has written whole chunks; the next one goes on from them.

Out of scope: which images are used (client/intake/selection), the form of a vault (client/intake/vault).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import numpy as np

from client.intake.chunks import Appender, compact, delete_unnamed, recover, verify
from client.intake.dataset import Form
from client.intake.decode import decode_records
from client.intake.pixels import Square
from client.intake.pseudonyms import Instances, Names
from client.intake.records import NOTHING_KNOWN, Known, Record, Refusal, Scan, Stamp
from client.intake.refusals import at_decoding
from client.intake.selection import Choice, Practice, choose, other_copies, other_labels
from client.intake.shortage import STAYS, too_few
from client.intake.sources import scan
from client.intake.vault import ROW, SEGMENT_BYTES, Manifest, Rows, create_vault, read_manifest, write_manifest
from common.errors import IntakeError, StorageError
from common.lock import alone as alone_on
from common.sealing import SealingKey

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much; 0 where that is not known."""

LOOKED_AT, DECODED = "files looked at", "images read"


@final
@dataclass(frozen=True)
class Imported:
    """What an import found and did; exact numbers, for the site's own eyes.

    Attributes:
        patients: Images of each patient that are in the vault now.
        labels: Images of each class.
        refused: Images that are not used, by reason.
        unchanged: Files that were known and not opened.
        added: Images that were decoded and added.
        found: What was opened: its records and refusals.
        choice: What of it was to be used.
        lost: Refused while decoding.
        taken_up: Images that an import which was interrupted or refused had decoded.
        gone: How many images are no longer in the vault, and of how many files.
        held: Files that could not be reached and stay in the vault as they were.
        states: The files that hold images of somebody, as they are now, by pseudonyms: what other vaults may hold.
    """

    patients: tuple[int, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    refused: Mapping[str, int]
    unchanged: int
    added: int
    found: Scan = field(repr=False)
    choice: Choice = field(repr=False)
    lost: tuple[Refusal, ...] = field(repr=False)
    taken_up: int
    gone: tuple[int, int]
    held: int
    states: Mapping[bytes, bytes] = field(repr=False)

    @property
    def images(self) -> int:
        """Return how many images the vault holds."""
        return sum(self.patients)


def import_source(
    vault: Path,
    key: SealingKey,
    form: Form,
    practice: Practice,
    min_patients: int = 1,
    progress: Progress | None = None,
    alone: AbstractContextManager[None] | None = None,
    name_labels: bool = False,
) -> Imported:
    """Bring a vault up to the state of the site's files.

    Args:
        vault: Its folder; made where there is none.
        key: The site's.
        form: What the images shall be.
        practice: How they are read.
        min_patients: With fewer the vault stays as it was, and what was decoded is kept for the next import.
        progress: Told before each file that is listed and after each image.
        alone: Held while the vault changes from one state to the next.
        name_labels: Errors may name labels, which may be values of headers.

    Raises:
        IntakeError: Nothing is usable.
        TooFewPatients: There are fewer than `min_patients`.
        MissingExtra: Nothing is usable, and a decoder is missing that can be installed.
        StorageError: The disk is full, the vault is damaged, or another import is running.

    Guarantees:
        - only_what_changed: Files that are known are neither opened nor decoded.
        - goes_on: After a crash at any line the old images are whole, and what was decoded is not decoded again.
        - gone_is_gone: Pixels of a file that changed or vanished stand in no file of the vault after an import that
          succeeds.
        - refused_before_deleted: An import that fails takes nothing from the vault.
        - not_reached_is_not_gone: Images of files that could not be reached stay, while the site's rules are the same
          and no table says otherwise.
        - order_of_patients: A first import numbers patients by (issuer, id), whatever the key.
        - however_often: An import again, of the same files, by the same rules or others, uses the same ones: the limit
          on the frames of a source counts those that are not opened.
        - damage_shows: Every chunk of the vault is opened first, so that a changed bit is an error also where nothing
          is new.
        - pseudonyms_only: Nothing of a header or a name is written but keyed pseudonyms and class numbers.
    """
    with alone_in(vault):
        before = _opened(vault, key, form)
        verify(vault, key, before)
        manifest = recover(vault, key, before)
        names = Names(key, practice.source, practice.digest())
        looked = _look(names, before, manifest, practice, progress)
        manifest, choice, lost, added = _decode(vault, names, manifest, looked.choice, practice, progress)
        seen = names.seen(looked.found, choice, lost) | {file: manifest.seen[file] for file in looked.known()}
        manifest = replace(manifest, seen=seen, folders=names.folders(manifest, seen), practice=names.practice)
        rows = manifest.rows[manifest.current()]
        taken_up = int(manifest.current()[len(before.rows) :].sum()) - added
        refused = dict(sorted(sum((Counter(one.refused) for one in seen.values()), Counter[str]()).items()))
        patients = tuple(Counter(rows["patient"].tolist()).values())
        if len(patients) < max(1, min_patients):
            others = other_labels(looked.found, form.classes, name_labels)
            there = bool(before.current().any())
            raise too_few(len(patients), min_patients, refused, others, kept=True, there=there)
        with alone or nullcontext():
            manifest = compact(vault, key, manifest)
            write_manifest(vault, key, manifest)
            delete_unnamed(vault, manifest)
    states = looked.known() | {names.file(record.path) for record in looked.found.records}
    return Imported(
        patients,
        tuple(np.bincount(rows["label"], minlength=len(form.classes)).tolist()),
        refused,
        len(looked.kept),
        added,
        looked.found,
        choice,
        lost,
        taken_up,
        _gone(before, rows),
        len(looked.held),
        {file: names.state_of(seen[file].stamp) for file in states},
    )


def told_of_files(progress: Progress | None, known: Known = NOTHING_KNOWN) -> Known:
    """Return what a scan asks about each file, so that it is told too."""
    done = 0

    def ask(path: Path, stamp: Stamp, beside: str) -> bool:
        nonlocal done
        done += 1
        if progress is not None:
            progress(LOOKED_AT, done, 0)
        return known.skip(path, stamp, beside)

    return replace(known, skip=ask)


@final
@dataclass(frozen=True)
class _Looked:
    """What a look at the source gave; files that are kept unopened, and those that could not be reached."""

    found: Scan
    choice: Choice
    kept: frozenset[bytes]
    held: frozenset[bytes]

    def known(self) -> frozenset[bytes]:
        return self.kept | self.held


def _look(names: Names, before: Manifest, manifest: Manifest, practice: Practice, progress: Progress | None) -> _Looked:
    try:
        found = scan(practice.source, practice.label, practice.rules, told_of_files(progress, names.known(manifest)))
    except IntakeError as error:
        if not before.current().any():
            raise
        raise type(error)(f"{error} {STAYS}") from error
    kept = frozenset(names.file(path) for path in found.skipped)
    held = frozenset(names.held(manifest, found)) - kept
    choice = choose(found, practice, manifest.form.classes, Instances(names.key, manifest, kept | held))
    return _Looked(found, choice, kept, held)


def _gone(before: Manifest, rows: Rows) -> tuple[int, int]:
    """Return how many images that counted before no longer do, and of how many files."""
    there = set(zip(rows["file"].tolist(), rows["part"].tolist(), strict=True))
    old = before.rows[before.current()]
    gone = [
        file for file, part in zip(old["file"].tolist(), old["part"].tolist(), strict=True) if (file, part) not in there
    ]
    return len(gone), len(set(gone))


def _decode(
    vault: Path, names: Names, manifest: Manifest, choice: Choice, practice: Practice, progress: Progress | None
) -> tuple[Manifest, Choice, tuple[Refusal, ...], int]:
    """Decode what is not in the vault yet and append it; return the manifest, choice, refusals and count."""
    form, key = manifest.form, names.key
    numbers = {name: number for number, name in enumerate(form.classes)}
    there = set(manifest.images())
    lost: list[Refusal] = []
    appender, records, added = Appender(vault, key, manifest), choice.records, 0
    while records:
        rows = [names.row(record, numbers[str(record.label)]) for record in records]
        todo = [number for number, row in enumerate(rows) if row[:3] not in there]
        asked, failed = (records[number] for number in todo), list[Record]()
        decoded = decode_records(asked, form.size, form.channels, practice.rules)
        for done, (number, (record, square)) in enumerate(zip(todo, decoded, strict=True), 1):
            if isinstance(square, str):
                lost.append(record.refused(at_decoding(square)))
                failed.append(record)
            else:
                appender = _add(appender, vault, key, rows[number], square)
            if progress is not None:
                progress(DECODED, done, len(todo))
        added += len(todo) - len(failed)
        choice, records = other_copies(choice, failed)
    return appender.finish(), choice, tuple(lost), added


def _add(appender: Appender, vault: Path, key: SealingKey, row: tuple[object, ...], square: Square) -> Appender:
    appender.add(np.array([row], ROW), square[None])
    return Appender(vault, key, appender.finish()) if appender.size_bytes > SEGMENT_BYTES else appender


def _opened(vault: Path, key: SealingKey, form: Form) -> Manifest:
    if not (vault / "manifest").exists():
        return create_vault(vault, key, form)
    manifest = read_manifest(vault, key)
    if manifest.form != form:
        raise StorageError("The vault holds images of another form: it was renamed or copied from elsewhere.")
    return manifest


def alone_in(vault: Path) -> AbstractContextManager[int]:
    """Hold a vault alone: one import at a time.

    Raises:
        StorageError: Another import holds it.
    """
    return alone_on(vault / "lock", "import")
