"""The images of a vault, read where training asks for them: memory-mapped, decrypted a chunk at a time.

Out of scope: how a vault is written (client/intake/vault).
"""

import mmap
from collections import OrderedDict
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt
from jaxtyping import Int64, UInt8

from client.intake.dataset import Dataset, Form
from client.intake.vault import (
    CHUNK_BYTES,
    Manifest,
    Rows,
    Segment,
    chunk_bytes,
    damaged,
    image_bytes,
    open_chunk,
    read_manifest,
    segment_path,
)
from common.errors import IntakeError
from common.sealing import SealingKey

CACHE_BYTES = 256 * 1024**2
"""Decrypted chunks that a reader keeps, at most."""


@final
class SealedPixels:
    """The images of a vault, as an array that is decrypted where it is read.

    Args:
        vault: The folder.
        key: The site's.
        manifest: Of the vault.
        places: For each image its row in the manifest.

    Guarantees:
        - never_wrong_pixels: A changed bit, another key, and chunks or files that changed places are errors.
        - bounded_memory: No more than `CACHE_BYTES` of decrypted chunks are kept, whatever the vault holds.
    """

    def __init__(self, vault: Path, key: SealingKey, manifest: Manifest, places: Int64[np.ndarray, " images"]) -> None:
        """Map the files; nothing is decrypted yet."""
        self._key, self._manifest, self._form, self._places = key, manifest, manifest.form, places
        chunks = [(segment, index) for segment in manifest.segments for index in range(len(segment.counts))]
        counts = [count for segment in manifest.segments for count in segment.counts]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._chunks = chunks
        self._maps = {segment.number: _mapped(vault, segment) for segment in manifest.segments}
        self._offsets = {segment.number: _offsets(segment, manifest.form) for segment in manifest.segments}
        self._cache: OrderedDict[int, UInt8[np.ndarray, "images channels size size"]] = OrderedDict()
        self._kept = max(1, CACHE_BYTES // max(1, CHUNK_BYTES, image_bytes(manifest.form)))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Images, channels, and the side twice."""
        return (len(self._places), self._form.channels, self._form.size, self._form.size)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._places)

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> UInt8[np.ndarray, "rows channels size size"]:
        """Decrypt some images.

        Raises:
            StorageError: What stands in the vault was changed, or sealed with another key.
        """
        places = self._places[rows]
        images = np.empty((len(places), *self.shape[1:]), np.uint8)
        chunk_of = np.searchsorted(self._starts, places, side="right") - 1
        for chunk in np.unique(chunk_of):
            here = chunk_of == chunk
            images[here] = self._chunk(int(chunk))[places[here] - self._starts[chunk]]
        return images

    def _chunk(self, number: int) -> UInt8[np.ndarray, "images channels size size"]:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        segment, index = self._chunks[number]
        start, end = self._offsets[segment.number][index : index + 2]
        sealed = memoryview(self._maps[segment.number])[start:end]
        rows, pixels = open_chunk(self._key, self._manifest, (segment.number, index), sealed)
        if len(rows) != segment.counts[index]:
            raise damaged()
        self._cache[number] = pixels
        if len(self._cache) > self._kept:
            self._cache.popitem(last=False)
        return pixels


def open_dataset(vault: Path, key: SealingKey) -> Dataset:
    """Open the training set of a vault; pixels are decrypted where they are read.

    Patients are numbered in the order of their first images, and one's images are adjacent.

    Raises:
        StorageError: The vault is gone, was changed, or is sealed with another key.
        IntakeError: It holds no image that counts.
    """
    manifest = read_manifest(vault, key)
    places = np.flatnonzero(manifest.current())
    if not len(places):
        raise IntakeError("No image is imported, or fewer patients than the policy asks for. Run the import again.")
    patients = patient_numbers(manifest.rows[places])
    order = np.argsort(patients, kind="stable")
    places = places[order]
    labels = manifest.rows["label"][places].astype(np.int64)
    return Dataset(SealedPixels(vault, key, manifest, places), labels, patients[order])


def patient_numbers(rows: Rows) -> Int64[np.ndarray, " images"]:
    """Number patients in the order in which they first appear."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(one, len(numbers)) for one in rows["patient"].tolist()], np.int64)


def _offsets(segment: Segment, form: Form) -> list[int]:
    sizes = [chunk_bytes(form, count) for count in segment.counts]
    if sum(sizes) != segment.size_bytes:
        raise damaged()
    return [0, *np.cumsum(sizes).tolist()]


def _mapped(vault: Path, segment: Segment) -> mmap.mmap:
    try:
        with segment_path(vault, segment.number).open("rb") as handle:
            content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise damaged() from error
    if len(content) != segment.size_bytes:
        raise damaged()
    return content
