"""Colours of a palette: what its three tables say of the stored values of a frame.

The tables are read here, since pydicom takes the sign, the byte order and the depth of their entries from the wrong
place; it unfolds segmented ones.

Source: DICOM PS3.3 C.7.6.3.1.5, C.7.6.3.1.6 (descriptor and data) and C.7.9.2 (segmented). Out of scope: decoding
(client/intake/dicom), supplemental palettes.
"""

import numpy as np
from jaxtyping import Float32, Integer
from pydicom import Dataset
from pydicom.pixels import apply_color_lut

from client.intake.refusals import Reason, Refused
from client.intake.stages import descriptor_of, words_of

_COLOURS = ("Red", "Green", "Blue")


def from_palette(stored: Integer[np.ndarray, "..."], dataset: Dataset) -> Float32[np.ndarray, "... 3"]:
    """Return red, green and blue of stored values, from 0 to 255. Values outside the palette take its ends.

    Raises:
        Refused: No palette, or tables that do not fit their descriptor, by length or by an entry.
        Exception: One of `DAMAGED_DICOM`, where a value is not what it should be.

    Guarantees:
        - bytes_in_words: Entries of 8 bits are the same in bytes and in words.
        - palettes_of_signed_values: A first value has the sign of the pixels, also where it is written without.
    """
    if dataset.get("PixelPresentation") in ("MIXED", "COLOR"):  # a supplemental palette, for a part of the values
        raise Refused(Reason.PIXELS)
    descriptor = dataset["RedPaletteColorLookupTableDescriptor"].value
    entries, first, bits = descriptor_of(descriptor, signed=bool(dataset.PixelRepresentation))
    if not 1 <= bits <= 16:
        raise Refused(Reason.PIXELS)
    if "RedPaletteColorLookupTableData" in dataset:
        tables = [_entries(dataset, name, entries, bits) for name in _COLOURS]
        table = np.stack([one * np.float32(255 / _top(one.dtype, bits)) for one in tables], axis=1, dtype=np.float32)
    else:
        unfolded = _unfolded(dataset, entries, int(descriptor[1]), bits)
        table = unfolded.astype(np.float32) * np.float32(255 / _top(unfolded.dtype, bits))
    place = np.clip(stored.astype(np.int64) - first, 0, entries - 1)
    return np.take(table, place, axis=0)


def _entries(dataset: Dataset, name: str, entries: int, bits: int) -> Integer[np.ndarray, " entries"]:
    """Read a table of words, or of bytes, the number of which tells which of both they are."""
    table = words_of(dataset[f"{name}PaletteColorLookupTableData"].value, dataset)
    if len(table) != entries and len(table) == (entries + 1) // 2:
        table = table.view(np.uint8)[:entries]
    if len(table) != entries or int(table.max()) > _top(table.dtype, bits):
        raise Refused(Reason.PIXELS)
    return table


def _top(kind: np.dtype[np.unsignedinteger], bits: int) -> int:
    """Return the full colour: of entries in bytes never more than a byte holds."""
    return 2 ** min(bits, kind.itemsize * 8) - 1


def _unfolded(dataset: Dataset, entries: int, first: int, bits: int) -> Integer[np.ndarray, "entries 3"]:
    """Let pydicom unfold segmented tables: it is asked for every entry once, in the place that it takes it to have."""
    if entries > 2**bits:  # pydicom counts places in the depth of the entries
        raise Refused(Reason.PIXELS)
    return apply_color_lut(np.arange(first, first + entries), dataset)[:, :3]
