"""From the site's files into a vault: what is new or changed is read, the rest stays, what is gone goes.

A file counts as unchanged while its size, its time of change, what tables beside it say of it and the site's rules are
the same. An import that is interrupted has written whole chunks; the next one goes on from them.

Out of scope: which images are used (client/intake/selection), the form of a vault (client/intake/vault).
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import numpy as np

from client.intake.chunks import Appender, compact, delete_unnamed, recover
from client.intake.dataset import Form
from client.intake.decode import decode_records
from client.intake.pixels import Square
from client.intake.records import Record, Refusal, Scan, Skip, Stamp
from client.intake.refusals import at_decoding, describe, for_want_of_an_extra, may_pass, remedies
from client.intake.selection import Choice, Practice, choose, instance_of, other_labels
from client.intake.sources import scan
from client.intake.vault import ROW, SEGMENT_BYTES, Manifest, Seen, create_vault, read_manifest, write_manifest
from common.errors import IntakeError, MissingExtra, StorageError, TooFewPatients
from common.lock import alone as alone_on
from common.sealing import PSEUDONYM_BYTES, SealingKey

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
    """

    patients: tuple[int, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    refused: Mapping[str, int]
    unchanged: int
    added: int
    found: Scan = field(repr=False)
    choice: Choice = field(repr=False)
    lost: tuple[Refusal, ...] = field(repr=False)

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
) -> Imported:
    """Bring a vault up to the state of the site's files.

    Args:
        vault: Its folder; made where there is none.
        key: The site's.
        form: What the images shall be.
        practice: How they are read.
        min_patients: With fewer the vault gives no images, and what was decoded is kept for the next import.
        progress: Told before each file that is listed and after each image.
        alone: Held while the vault changes from one state to the next.

    Raises:
        IntakeError: Nothing is usable.
        TooFewPatients: There are fewer than `min_patients`.
        MissingExtra: Nothing is usable, and a decoder is missing that can be installed.
        StorageError: The disk is full, the vault is damaged, or another import is running.

    Guarantees:
        - only_what_changed: Files that are known are neither opened nor decoded.
        - goes_on: After a crash at any line the old images are whole, and what was decoded is not decoded again.
        - gone_is_gone: Pixels of a file that changed or vanished stand in no file of the vault afterwards.
        - order_of_patients: A first import numbers patients by (issuer, id), whatever the key.
        - pseudonyms_only: Nothing of a header or a name is written but keyed pseudonyms and class numbers.
    """
    with _alone(vault):
        manifest = recover(vault, key, _opened(vault, key, form))
        names = _Names(key, practice.source, practice.digest())
        found = scan(practice.source, practice.label, practice.rules, told_of_files(progress, names.skip(manifest)))
        kept = {names.file(path) for path in found.skipped}
        choice = choose(found, practice, form.classes, _Instances(key, manifest, kept))
        manifest, lost, added = _decode(vault, names, manifest, choice, practice, progress)
        seen = {file: manifest.seen[file] for file in kept} | names.seen(found, choice, lost)
        with alone or nullcontext():
            manifest = compact(vault, key, replace(manifest, seen=seen))
            rows = manifest.rows[manifest.current()]
            patients = tuple(Counter(rows["patient"].tolist()).values())
            few = len(patients) < max(1, min_patients)
            write_manifest(vault, key, replace(manifest, seen={}) if few else manifest)
            delete_unnamed(vault, manifest)
    refused = sum((Counter(one.refused) for one in seen.values()), Counter[str]())
    if few:
        raise too_few(len(patients), min_patients, refused, other_labels(found, form.classes), kept=True)
    labels = tuple(np.bincount(rows["label"], minlength=len(form.classes)).tolist())
    return Imported(patients, labels, dict(sorted(refused.items())), len(kept), added, found, choice, lost)


def told_of_files(progress: Progress | None, skip: Skip | None = None) -> Skip:
    """Return what a scan asks about each file, so that it is told too."""
    done = 0

    def ask(path: Path, stamp: Stamp, beside: str) -> bool:
        nonlocal done
        done += 1
        if progress is not None:
            progress(LOOKED_AT, done, 0)
        return skip is not None and skip(path, stamp, beside)

    return ask


@final
class _Names:
    """Pseudonyms of what one import meets."""

    def __init__(self, key: SealingKey, source: Path, digest: str) -> None:
        self.key, self._digest = key, digest
        self._root = os.path.realpath(source if source.is_dir() else source.parent)
        self._folders: dict[Path, str] = {}

    def file(self, path: Path) -> bytes:
        folder = self._folders.get(path.parent)
        if folder is None:  # the source may be reached by another way than before
            folder = self._folders[path.parent] = os.path.relpath(os.path.realpath(path.parent), self._root)
        return self.key.pseudonym(os.fsencode(f"{folder}/{path.name}"), "file")

    def stamp(self, stamp: Stamp, beside: str) -> bytes:
        return self.key.pseudonym(json.dumps([*stamp, beside, self._digest]).encode(), "stamp")

    def row(self, record: Record, label: int) -> tuple[bytes, bytes, bytes, bytes, bytes, int]:
        part = self.key.pseudonym(json.dumps([record.member, record.frame]).encode(), "part")
        patient = self.key.pseudonym(json.dumps(record.patient).encode(), "patient")
        name = instance_of(record)
        instance = self.key.pseudonym(name.encode(), "instance") if name else bytes(PSEUDONYM_BYTES)
        return self.file(record.path), self.stamp(record.stamp, record.beside), part, patient, instance, label

    def skip(self, manifest: Manifest) -> Callable[[Path, Stamp, str], bool]:
        def known(path: Path, stamp: Stamp, beside: str) -> bool:
            seen = manifest.seen.get(self.file(path))
            return seen is not None and seen.stamp == self.stamp(stamp, beside) and not any(map(may_pass, seen.refused))

        return known

    def seen(self, found: Scan, choice: Choice, lost: tuple[Refusal, ...]) -> dict[bytes, Seen]:
        stamps: dict[bytes, bytes] = {}
        counts: dict[bytes, Counter[str]] = {}
        for item in (*found.records, *choice.refusals, *lost):
            file = self.file(item.path)
            stamps[file] = self.stamp(item.stamp, item.beside)
            counts.setdefault(file, Counter())
            if isinstance(item, Refusal):
                counts[file][item.reason] += 1
        for reason, count in choice.uncounted:  # of an NPZ, the one file that there is
            counts[next(iter(counts))][reason] += count
        return {file: Seen(stamps[file], dict(counts[file])) for file in stamps}


@final
class _Instances:
    """DICOM instances of files that are not opened again, by pseudonym."""

    def __init__(self, key: SealingKey, manifest: Manifest, kept: set[bytes]) -> None:
        rows = manifest.rows[manifest.current()]
        pairs = zip(rows["file"].tolist(), rows["instance"].tolist(), strict=True)
        self._key, self._there = key, {instance for file, instance in pairs if file in kept}

    def __contains__(self, name: object) -> bool:
        return bool(name) and self._key.pseudonym(str(name).encode(), "instance") in self._there


def _decode(
    vault: Path, names: _Names, manifest: Manifest, choice: Choice, practice: Practice, progress: Progress | None
) -> tuple[Manifest, tuple[Refusal, ...], int]:
    """Decode what is not in the vault yet and append it; return the manifest with it, the refusals and the count."""
    form, key = manifest.form, names.key
    numbers = {name: number for number, name in enumerate(form.classes)}
    rows = [names.row(record, numbers[str(record.label)]) for record in choice.records]
    there = set(manifest.images())
    todo = [number for number, row in enumerate(rows) if row[:3] not in there]
    lost: list[Refusal] = []
    appender = Appender(vault, key, manifest)
    records = (choice.records[number] for number in todo)
    decoded = decode_records(records, form.size, form.channels, practice.rules)
    for done, (number, (record, square)) in enumerate(zip(todo, decoded, strict=True), 1):
        if isinstance(square, str):
            lost.append(record.refused(at_decoding(square)))
        else:
            appender = _add(appender, vault, key, rows[number], square)
        if progress is not None:
            progress(DECODED, done, len(todo))
    return appender.finish(), tuple(lost), len(todo) - len(lost)


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


def _alone(vault: Path) -> AbstractContextManager[None]:
    return alone_on(vault / "lock", "import")


def too_few(
    patients: int, least: int, refused: Mapping[str, int], others: str = "", *, kept: bool = False
) -> IntakeError | TooFewPatients | MissingExtra:
    """Return the error for a source with fewer usable patients than there have to be, perhaps none.

    Args:
        patients: How many are usable.
        least: How many there have to be.
        refused: Images that are not used, by reason.
        others: What `other_labels` says.
        kept: Whether what was decoded is kept for the next import.
    """
    if patients:
        return TooFewPatients(
            f"Expected at least min_patients={least} usable patients at this site, found {patients} "
            f"({describe(refused) or 'no image was refused'}). Add patients, or lower privacy.min_patients and the "
            "policy's min_patients." + (" What was read is kept for then." if kept else "") + (others and f" {others}")
        )
    said = describe(refused) or "there is none"
    advice = "; ".join(remedies(refused)) or others or "Mend these and run again"
    missing = MissingExtra if any(map(for_want_of_an_extra, refused)) else IntakeError
    return missing(f"No image could be used ({said}). {advice.rstrip('.')}.")
