"""Columns and rows of a PNG, JPEG or TIFF file as it states them, in pure Python, within bounds: for reports alone.

What decodes the image reads the size again and trusts nothing of this. Out of scope: whether the file is whole.
"""

import struct
from typing import BinaryIO

_SEGMENTS = 256
"""Of a JPEG that are looked through for the one with the size."""
_ENTRIES = 256
"""Of a TIFF's first directory."""

Size = tuple[int, int]
"""Columns and rows."""


def size_of(handle: BinaryIO) -> Size | None:
    """Return the size that a file states; None where it states none, or not where it is looked for.

    Source: PNG (W3C) 11.2.2; JPEG, ITU T.81 B.2.2; TIFF 6.0 section 2.
    """
    try:
        start = handle.read(24)
        if start.startswith(b"\x89PNG"):
            return struct.unpack(">II", start[16:24])
        if start.startswith(b"\xff\xd8"):
            return _jpeg(handle)
        if start.startswith((b"II*\0", b"MM\0*")):
            return _tiff(handle, "<" if start.startswith(b"I") else ">", start)
    except (OSError, struct.error, ValueError):
        return None
    return None


def _jpeg(handle: BinaryIO) -> Size | None:
    handle.seek(2)
    for _ in range(_SEGMENTS):
        mark, kind, length = struct.unpack(">BBH", handle.read(4))
        if mark != 0xFF or length < 2:
            return None
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            rows, columns = struct.unpack(">xHH", handle.read(5))
            return columns, rows
        handle.seek(length - 2, 1)
    return None


def _tiff(handle: BinaryIO, order: str, start: bytes) -> Size | None:
    handle.seek(struct.unpack(f"{order}I", start[4:8])[0])
    (count,) = struct.unpack(f"{order}H", handle.read(2))
    found: dict[int, int] = {}
    for _ in range(min(count, _ENTRIES)):
        tag, kind, _, short = struct.unpack(f"{order}HHIH2x", entry := handle.read(12))
        if tag in (256, 257):
            found[tag] = short if kind == 3 else struct.unpack(f"{order}I", entry[8:])[0]
    return (found[256], found[257]) if len(found) == 2 else None
