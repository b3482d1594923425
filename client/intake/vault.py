"""The training set on disk: encrypted pixels, pseudonyms and class numbers, and nothing else of any file.

A vault is a folder:

    manifest        sealed: what the images are, which files were seen, and a row for each image
    pixels-00000    chunks of images, each sealed for its place

A row counts while the manifest knows its file with the stamp that it had: an import appends first and writes the
manifest last, so that one which is interrupted leaves the old set whole and its own chunks for the next to take up.
Files that hold rows which no longer count are written anew without them, so that the pixels of a patient who is gone
are gone.

Out of scope: writing chunks (client/intake/chunks), reading them for training (client/intake/sealed), when a file
counts as changed (client/intake/importing).
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from client.intake.dataset import Form
from common.errors import StorageError, WireError
from common.files import make_folder, read_bounded, write_atomic
from common.sealing import PSEUDONYM_BYTES, SEAL_BYTES, SealingKey

VERSION = 3
CHUNK_BYTES = 64 * 1024
"""About the pixels of a chunk: what is decrypted for one image that is asked for."""
SEGMENT_BYTES = 256 * 1024**2
"""About the most of a file of chunks: what is rewritten when one of its images no longer counts."""
MAX_MANIFEST_BYTES = 2 * 1024**3
MAX_CLASSES = 2**16

_NAMES = ("file", "stamp", "part", "patient", "instance")
ROW = np.dtype([*((name, f"V{PSEUDONYM_BYTES}") for name in _NAMES), ("label", "<u2")])
"""One image, by pseudonyms: its file and what that looked like, which image of the file it is, its patient, its DICOM
instance (zeros where there is none); and its class number."""

Rows = npt.NDArray[np.void]


@final
@dataclass(frozen=True)
class Seen:
    """A file that an import has looked at.

    Attributes:
        stamp: What the file looked like; another stamp is another file.
        refused: How many of its images were refused, by reason.
        folder: Where it stands, by pseudonym.
        frames: How many images it gave, used or not; 0 where there is one in the file, or in each of its members.
    """

    stamp: bytes
    refused: Mapping[str, int]
    folder: bytes = b""
    frames: int = 0


@final
@dataclass(frozen=True)
class Segment:
    """A file of chunks: its number, how many images each chunk holds, and its size in bytes."""

    number: int
    counts: tuple[int, ...]
    size_bytes: int


@final
@dataclass(frozen=True, eq=False)
class Manifest:
    """What a vault holds.

    Attributes:
        id: 16 random bytes: what is sealed for one vault does not open in another.
        form: Of its images.
        next: Number of the next file of chunks; none is used twice.
        segments: The files of chunks, in the order of `rows`.
        rows: A row for each image of the segments.
        seen: Every file that was looked at, by its pseudonym.
        folders: The folder in which each folder stands, by pseudonyms.
        practice: The site's rules by which the images were read, by pseudonym.
    """

    id: bytes
    form: Form
    next: int = 0
    segments: tuple[Segment, ...] = ()
    rows: Rows = field(default_factory=lambda: np.empty(0, ROW), repr=False)
    seen: Mapping[bytes, Seen] = field(default_factory=dict[bytes, Seen], repr=False)
    folders: Mapping[bytes, bytes] = field(default_factory=dict[bytes, bytes], repr=False)
    practice: bytes = b""

    def is_below(self, folder: bytes, others: Set[bytes]) -> bool:
        """Return whether a folder is one of others or stands in one, at any depth."""
        met: set[bytes] = set()
        while folder and folder not in met:
            if folder in others:
                return True
            met.add(folder)
            folder = self.folders.get(folder, b"")
        return False

    def current(self) -> npt.NDArray[np.bool_]:
        """Return which rows count: those whose file is known with the stamp that it had, each image once."""
        there = np.zeros(len(self.rows), bool)
        once: set[bytes] = set()
        for place, (file, stamp, part) in enumerate(self.images()):
            seen = self.seen.get(file)
            if seen is not None and seen.stamp == stamp and file + part not in once:
                once.add(file + part)
                there[place] = True
        return there

    def images(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Return file, stamp and part of each row."""
        return zip(*(self.rows[name].tolist() for name in ("file", "stamp", "part")), strict=True)


def create_vault(vault: Path, key: SealingKey, form: Form) -> Manifest:
    """Make an empty vault.

    Raises:
        StorageError: The folder cannot be written.
    """
    make_folder(vault, 0o700)
    manifest = Manifest(os.urandom(PSEUDONYM_BYTES), form)
    write_manifest(vault, key, manifest)
    return manifest


def read_manifest(vault: Path, key: SealingKey) -> Manifest:
    """Read what a vault holds.

    Raises:
        StorageError: There is none, it was changed, or the key is another's.
    """
    try:
        content = key.open(read_bounded(vault / "manifest", MAX_MANIFEST_BYTES), b"manifest")
        (length,) = struct.unpack_from("<I", content)
        tree = json.loads(content[4 : 4 + length])
        rows = np.frombuffer(content, ROW, offset=4 + length)
        form = Form(tuple(tree["classes"]), tree["size"], tree["channels"])
        segments = tuple(Segment(number, tuple(counts), size) for number, counts, size in tree["segments"])
        seen = {
            bytes.fromhex(file): Seen(bytes.fromhex(stamp), refused, bytes.fromhex(folder), frames)
            for file, (stamp, refused, folder, frames) in tree["seen"].items()
        }
        folders = {bytes.fromhex(folder): bytes.fromhex(above) for folder, above in tree["folders"].items()}
        practice = bytes.fromhex(tree["practice"])
        manifest = Manifest(bytes.fromhex(tree["id"]), form, tree["next"], segments, rows, seen, folders, practice)
    except (WireError, ValueError, KeyError, TypeError, struct.error) as error:
        raise damaged() from error
    if tree["version"] != VERSION or len(rows) != sum(sum(segment.counts) for segment in segments):
        raise damaged()
    return manifest


def write_manifest(vault: Path, key: SealingKey, manifest: Manifest) -> None:
    """Make a state of the vault the one that counts.

    Raises:
        StorageError: It cannot be written; the state before stands.
    """
    tree: dict[str, Any] = {
        "version": VERSION,
        "id": manifest.id.hex(),
        "classes": manifest.form.classes,
        "size": manifest.form.size,
    }
    tree |= {"channels": manifest.form.channels, "next": manifest.next}
    tree["segments"] = [[part.number, part.counts, part.size_bytes] for part in manifest.segments]
    tree["seen"] = {
        file.hex(): [seen.stamp.hex(), dict(seen.refused), seen.folder.hex(), seen.frames]
        for file, seen in manifest.seen.items()
    }
    tree["folders"] = {folder.hex(): above.hex() for folder, above in manifest.folders.items()}
    tree["practice"] = manifest.practice.hex()
    head = json.dumps(tree, separators=(",", ":")).encode()
    content = struct.pack("<I", len(head)) + head + manifest.rows.tobytes()
    write_atomic(vault / "manifest", key.seal(content, b"manifest"), 0o600)


def image_bytes(form: Form) -> int:
    """Return the bytes of one image."""
    return form.channels * form.size**2


def chunk_bytes(form: Form, count: int) -> int:
    """Return the bytes of a sealed chunk of so many images, with its length before it."""
    return 4 + SEAL_BYTES + 4 + count * (ROW.itemsize + image_bytes(form))


def open_chunk(
    key: SealingKey, manifest: Manifest, place: tuple[int, int], frame: memoryview
) -> tuple[Rows, UInt8[np.ndarray, "images channels size size"]]:
    """Open one chunk.

    Args:
        key: The site's.
        manifest: Of the vault; its id and form.
        place: Number of the file, and of the chunk in it.
        frame: From the start of the chunk on, to its end or that of the file.

    Raises:
        StorageError: It was changed, is cut short, or belongs elsewhere.
    """
    try:
        (length,) = struct.unpack_from("<I", frame)
        if length > len(frame) - 4:
            raise damaged()
        content = key.open(frame[4 : 4 + length], place_of(manifest, *place))
        (count,) = struct.unpack_from("<I", content)
        rows = np.frombuffer(content, ROW, count, 4)
        form = manifest.form
        pixels = np.frombuffer(content, np.uint8, offset=4 + count * ROW.itemsize)
        return rows, pixels.reshape(count, form.channels, form.size, form.size)
    except (WireError, ValueError, struct.error) as error:
        raise damaged() from error


def place_of(manifest: Manifest, segment: int, index: int) -> bytes:
    """Return what a chunk is sealed for: its vault, file and place in it, and the form of its images."""
    form = manifest.form
    return b"chunk" + manifest.id + struct.pack("<IIHB", segment, index, form.size, form.channels)


def segment_path(vault: Path, number: int) -> Path:
    """Return the path of a file of chunks."""
    return vault / f"pixels-{number:05d}"


def damaged() -> StorageError:
    """Return the error for whatever does not open."""
    return StorageError(
        "The imported images of this home are damaged, or sealed with another key than keys/vault.json. Restore both "
        "from one backup, or delete the folder of the vault and run the import again."
    )
