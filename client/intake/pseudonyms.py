"""Pseudonyms of what an import meets: files, what they look like, folders, images, patients, DICOM instances.

Keyed (HMAC), so that a vault tells nothing to whoever has not the site's key. Out of scope: what is done with them
(client/intake/importing).
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path, PurePath
from typing import final

from client.intake.patients import Patient
from client.intake.records import Known, Record, Refusal, Scan, Stamp
from client.intake.refusals import Reason, may_pass
from client.intake.selection import Choice, instance_of
from client.intake.vault import Manifest, Seen
from common.sealing import PSEUDONYM_BYTES, SealingKey

_HALF = PSEUDONYM_BYTES // 2
_UNKNOWN = (0, 0)
"""The stamp of a file of which the file system tells nothing."""


@final
class Names:
    """Pseudonyms of what one import meets.

    Args:
        key: The site's.
        source: The folder or file; files are named relative to it.
        digest: Of the site's rules.
    """

    def __init__(self, key: SealingKey, source: Path, digest: str) -> None:
        """Meet nothing yet."""
        self.key, self._digest = key, digest
        self.practice = key.pseudonym(digest.encode(), "practice")
        self._root = os.path.realpath(source if source.is_dir() else source.parent)
        self._relative: dict[Path, str] = {}
        self._folders: dict[bytes, bytes] = {}

    def file(self, path: Path) -> bytes:
        """Name a file."""
        return self.key.pseudonym(os.fsencode(f"{self._within(path.parent)}/{path.name}"), "file")

    def folder(self, path: Path) -> bytes:
        """Name a folder."""
        return self._folder(self._within(path))

    def folders(self, manifest: Manifest, seen: Mapping[bytes, Seen]) -> Mapping[bytes, bytes]:
        """Return the folder in which each folder stands, of those that hold files which are known."""
        known, there = {**manifest.folders, **self._folders}, dict[bytes, bytes]()
        for folder in {one.folder for one in seen.values()}:
            while folder in known and folder not in there:
                there[folder] = known[folder]
                folder = known[folder]
        return there

    def stamp(self, stamp: Stamp, beside: str) -> bytes:
        """Name what a file looks like: its state, and what tables and rules say of it."""
        said = self.key.pseudonym(json.dumps([beside, self._digest]).encode(), "said")
        return self.key.pseudonym(json.dumps(stamp).encode(), "state")[:_HALF] + said[:_HALF]

    @staticmethod
    def state_of(stamp: bytes) -> bytes:
        """Return what of a stamp is the file's alone, whatever tables and rules say of it."""
        return stamp[:_HALF]

    def row(self, record: Record, label: int) -> tuple[bytes, bytes, bytes, bytes, bytes, int]:
        """Name an image."""
        part = self.key.pseudonym(json.dumps([record.member, record.frame]).encode(), "part")
        patient = _patient(self.key, record.patient)
        name = instance_of(record)
        instance = self.key.pseudonym(name.encode(), "instance") if name else bytes(PSEUDONYM_BYTES)
        return self.file(record.path), self.stamp(record.stamp, record.beside), part, patient, instance, label

    def known(self, manifest: Manifest) -> Known:
        """Return what tells whether a file is known as it is, and how many frames those hold that are not opened."""

        def skip(path: Path, stamp: Stamp, beside: str) -> bool:
            seen = manifest.seen.get(self.file(path))
            return seen is not None and seen.stamp == self.stamp(stamp, beside) and not any(map(may_pass, seen.refused))

        def frames(found: Scan) -> int:
            files = {self.file(path) for path in found.skipped} | self.held(manifest, found)
            return sum(manifest.seen[file].frames for file in files)

        return Known(skip, frames)

    def held(self, manifest: Manifest, found: Scan) -> set[bytes]:
        """Return the files that are known, were not reached, and of which nothing says that they changed."""
        met = {self.file(item.path) for item in (*found.records, *found.refusals)}
        closed = {self.folder(one.path) for one in found.refusals if one.reason == Reason.FOLDER}
        held: set[bytes] = set()
        if closed and manifest.practice == self.practice:
            held = {file for file, seen in manifest.seen.items() if manifest.is_below(seen.folder, closed)} - met
        for one in found.refusals:
            file = self.file(one.path)
            seen = manifest.seen.get(file)
            if one.reason == Reason.NOT_READABLE and seen is not None:
                now = self.stamp(one.stamp, one.beside)
                same = now == seen.stamp if one.stamp != _UNKNOWN else now[_HALF:] == seen.stamp[_HALF:]
                held |= {file} if same else set()
        return held

    def seen(self, found: Scan, choice: Choice, lost: tuple[Refusal, ...]) -> dict[bytes, Seen]:
        """Return what is known of all files that were looked at."""
        about: dict[bytes, tuple[bytes, bytes]] = {}
        counts: dict[bytes, Counter[str]] = {}
        for item in (*found.records, *choice.refusals, *lost):
            file = self.file(item.path)
            if file not in about or isinstance(item, Record):
                about[file] = self.stamp(item.stamp, item.beside), self.folder(item.path.parent)
            counts.setdefault(file, Counter())
            if isinstance(item, Refusal):
                counts[file][item.reason] += 1
        for reason, count in choice.uncounted:  # of an NPZ, the file that comes first
            counts[next(iter(counts))][reason] += count
        frames = self._frames(found.records)
        return {file: Seen(stamp, dict(counts[file]), folder, frames[file]) for file, (stamp, folder) in about.items()}

    def _frames(self, records: Iterable[Record]) -> Counter[bytes]:
        frames: Counter[bytes] = Counter()
        for (path, _), count in Counter((record.path, record.member) for record in records).items():
            frames[self.file(path)] += count if count > 1 else 0
        return frames

    def _within(self, folder: Path) -> str:
        relative = self._relative.get(folder)
        if relative is None:  # the source may be reached by another way than before
            relative = self._relative[folder] = os.path.relpath(os.path.realpath(folder), self._root)
        return relative

    def _folder(self, relative: str) -> bytes:
        name = self.key.pseudonym(os.fsencode(relative), "folder")
        if name not in self._folders and relative not in (".", ".."):
            self._folders[name] = self._folder(str(PurePath(relative).parent))
        return name


@final
class Instances:
    """DICOM instances of files that are not opened again, by pseudonym."""

    def __init__(self, key: SealingKey, manifest: Manifest, kept: Set[bytes]) -> None:
        """Collect those of the files `kept`."""
        rows = manifest.rows[manifest.current()]
        each = zip(rows["file"].tolist(), rows["instance"].tolist(), rows["patient"].tolist(), strict=True)
        self._key, self._there = key, {instance: patient for file, instance, patient in each if file in kept}

    def __contains__(self, name: object) -> bool:
        """Return whether an instance is there."""
        return bool(name) and self._key.pseudonym(str(name).encode(), "instance") in self._there

    def of_another(self, name: str, patient: Patient) -> bool:
        """Return whether an instance is there, for another patient than this one."""
        there = self._there.get(self._key.pseudonym(name.encode(), "instance"))
        return there is not None and there != _patient(self._key, patient)


def _patient(key: SealingKey, patient: Patient) -> bytes:
    return key.pseudonym(json.dumps(patient).encode(), "patient")
