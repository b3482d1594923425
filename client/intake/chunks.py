"""Writing a vault's files of chunks: appending, taking up what was interrupted, leaving out what no longer counts.

Out of scope: what a chunk and a manifest are (client/intake/vault), when a file counts (client/intake/importing).
"""

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from client.intake.dataset import Form
from client.intake.vault import (
    CHUNK_BYTES,
    ROW,
    Manifest,
    Rows,
    Segment,
    chunk_bytes,
    damaged,
    image_bytes,
    open_chunk,
    place_of,
    segment_path,
)
from common.errors import StorageError
from common.files import sync_folder
from common.sealing import SealingKey

_FILE = re.compile("pixels-([0-9]{5,})")


@final
class Appender:
    """Writes the chunks of one import into a new file of a vault.

    Args:
        vault: The folder.
        key: The site's.
        manifest: As it stands; the new file has its `next` number.

    Guarantees:
        - whole_chunks: After a crash at any line the file holds whole chunks, and at its end perhaps a part of one,
          which `recover` drops.
    """

    def __init__(self, vault: Path, key: SealingKey, manifest: Manifest) -> None:
        """Start the file with its first chunk."""
        self._path, self._key, self._manifest = segment_path(vault, manifest.next), key, manifest
        self._images = chunk_images(manifest.form)
        self._rows, self._pixels = list[np.void](), list[npt.NDArray[np.uint8]]()
        self._counts = list[int]()
        self.size_bytes = 0
        self.rows = list[Rows]()

    def add(self, rows: Rows, pixels: UInt8[np.ndarray, "images channels size size"]) -> None:
        """Add images; they reach the disk a chunk at a time.

        Raises:
            StorageError: The disk is full or the folder cannot be written.
        """
        self._rows += list(rows)
        self._pixels += list(pixels)
        while len(self._rows) >= self._images:
            self._write(self._images)

    def finish(self) -> Manifest:
        """Write what is left, and return the manifest with this file behind the others.

        Raises:
            StorageError: As `add`.
        """
        if self._rows:
            self._write(len(self._rows))
        if not self._counts:
            return self._manifest
        _flush(self._path)
        before = self._manifest
        segment = Segment(before.next, tuple(self._counts), self.size_bytes)
        rows = np.concatenate([before.rows, *self.rows])
        return replace(before, next=before.next + 1, segments=(*before.segments, segment), rows=rows)

    def _write(self, count: int) -> None:
        rows = np.array(self._rows[:count], ROW)
        content = struct.pack("<I", count) + rows.tobytes() + np.stack(self._pixels[:count]).tobytes()
        sealed = self._key.seal(content, place_of(self._manifest, self._manifest.next, len(self._counts)))
        frame = struct.pack("<I", len(sealed)) + sealed
        _append(self._path, frame)
        del self._rows[:count], self._pixels[:count]
        self.rows.append(rows)
        self._counts.append(count)
        self.size_bytes += len(frame)


def recover(vault: Path, key: SealingKey, manifest: Manifest) -> Manifest:
    """Take up the chunks of an import that was interrupted, and delete what no manifest names and nothing can use.

    Returns:
        The manifest with these chunks; their files count as seen once an import says so.

    Raises:
        StorageError: A file cannot be read or cut.
    """
    delete_unnamed(vault, manifest)
    segments, rows, after = list(manifest.segments), [manifest.rows], manifest.next
    for number, path in _files(vault):
        if number < manifest.next:
            continue
        after = number + 1
        found = list(_whole_chunks(path, key, manifest, number))
        if not found:
            path.unlink()
            continue
        size = sum(length for _, length in found)
        os.truncate(path, size)
        segments.append(Segment(number, tuple(len(part) for part, _ in found), size))
        rows += [part for part, _ in found]
    return replace(manifest, next=after, segments=tuple(segments), rows=np.concatenate(rows))


def verify(vault: Path, key: SealingKey, manifest: Manifest) -> None:
    """Open every chunk that a manifest names.

    Raises:
        StorageError: One is gone, was changed, or is not what the manifest says.
    """
    place = 0
    for segment in manifest.segments:
        for rows, _ in _chunks(vault, key, manifest, segment):
            if rows.tobytes() != manifest.rows[place : place + len(rows)].tobytes():
                raise damaged()
            place += len(rows)


def compact(
    vault: Path, key: SealingKey, manifest: Manifest, kept_rows: npt.NDArray[np.bool_] | None = None
) -> Manifest:
    """Write files of chunks without the rows that do not count, in place of those that hold such rows.

    Args:
        vault: The folder.
        key: The site's.
        manifest: What it holds.
        kept_rows: The rows that count; None: those that do by the manifest.

    Returns:
        The manifest that names them; once it is written, `delete_unnamed` deletes the others.

    Raises:
        StorageError: A file cannot be read or written, or does not open.

    Guarantees:
        - gone: What does not count stands in no file that the manifest names.
        - order_stays: Rows that count stay in their order.
    """
    counts, place = manifest.current() if kept_rows is None else kept_rows, 0
    result = replace(manifest, segments=(), rows=manifest.rows[:0])
    for segment in manifest.segments:
        end = place + sum(segment.counts)
        there, rows = counts[place:end], manifest.rows[place:end]
        place = end
        if there.all():
            result = replace(result, segments=(*result.segments, segment), rows=np.concatenate([result.rows, rows]))
            continue
        appender = Appender(vault, key, result)
        start = 0
        for chunk, pixels in _chunks(vault, key, manifest, segment):
            kept = there[start : start + len(chunk)]
            appender.add(chunk[kept], pixels[kept])
            start += len(chunk)
        result = appender.finish()
    return result


def delete_unnamed(vault: Path, manifest: Manifest) -> None:
    """Delete files of chunks that this manifest and those before it no longer name.

    Raises:
        StorageError: A file cannot be deleted.
    """
    named = {segment.number for segment in manifest.segments}
    try:
        for number, path in _files(vault):
            if number < manifest.next and number not in named:
                path.unlink()
    except OSError as error:
        raise StorageError(f"Could not delete a file of the vault: {error.strerror}. Mend its permissions.") from error


def chunk_images(form: Form) -> int:
    """Return how many images a chunk holds."""
    return max(1, CHUNK_BYTES // image_bytes(form))


def _files(vault: Path) -> list[tuple[int, Path]]:
    """Return the files of chunks with their numbers; what somebody else put beside them stays what it is."""
    numbers = {path: int(name[1]) for path in vault.iterdir() if (name := _FILE.fullmatch(path.name))}
    return sorted((number, path) for path, number in numbers.items() if path == segment_path(vault, number))


def _chunks(
    vault: Path, key: SealingKey, manifest: Manifest, segment: Segment
) -> Iterator[tuple[Rows, UInt8[np.ndarray, "images channels size size"]]]:
    try:
        with segment_path(vault, segment.number).open("rb") as handle:
            if os.fstat(handle.fileno()).st_size != segment.size_bytes:
                raise damaged()
            for index, count in enumerate(segment.counts):
                size = chunk_bytes(manifest.form, count)
                rows, pixels = open_chunk(key, manifest, (segment.number, index), memoryview(handle.read(size)))
                if len(rows) != count:
                    raise damaged()
                yield rows, pixels
    except OSError as error:
        raise damaged() from error


def _whole_chunks(path: Path, key: SealingKey, manifest: Manifest, number: int) -> Iterator[tuple[Rows, int]]:
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise StorageError(
            f"Could not read {path.name} of the vault: {error.strerror}. Mend its permissions."
        ) from error
    offset = index = 0
    while offset < len(content):
        try:
            rows, _ = open_chunk(key, manifest, (number, index), content[offset:])
        except StorageError:  # the part that a crash left
            return
        (length,) = struct.unpack_from("<I", content, offset)
        yield rows, 4 + length
        offset, index = offset + 4 + length, index + 1


def _append(path: Path, frame: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(frame)
    except OSError as error:
        raise StorageError(
            f"Could not write {len(frame)} bytes to the vault: {error.strerror}. Free space, then run the import "
            "again: it goes on."
        ) from error


def _flush(path: Path) -> None:
    """Bring a file to the disk; until then a power cut may cost its end, which shows when it is opened."""
    try:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"Could not write to the vault: {error.strerror}. Free space, then run it again.") from error
