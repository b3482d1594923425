"""What a compressed image says of its own form, read before it is decoded: its header may say something else.

Decoders allocate what the codestream states, and pydicom lays out what they give as the DICOM header states it.

Source: ITU-T T.81 B.1.1 (markers), B.2.2 (frame header) and B.2.3 (scan header), T.87 C.2.2 and C.2.3 (JPEG-LS), T.800
A.5.1 (SIZ), A.6.1 (COD) and I.4 (boxes of JP2), T.814 (HTJ2K, which has the same). Out of scope: decoding.
"""

import struct
from collections.abc import Iterator

Shape = tuple[int, int, int]
"""Rows, columns and samples of a pixel."""

_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Markers of a frame header; F7 is JPEG-LS."""
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
"""Those of a JPEG that gives back what was packed."""
_ALONE = {0x01, *range(0xD0, 0xD9)}
"""Markers without a length."""
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"


def shape_of(data: bytes) -> Shape:
    """Return the shape that a JPEG, JPEG-LS or JPEG 2000 image states.

    Raises:
        ValueError: It states none.
        struct.error: It is cut short.
    """
    if data.startswith(b"\xff\xd8"):
        _, place = _frame(data)
        return struct.unpack_from(">HHB", data, place + 3)
    start = _siz(data)
    right, bottom, left, top = struct.unpack_from(">4L", data, start + 8)
    (samples,) = struct.unpack_from(">H", data, start + 40)
    return bottom - top, right - left, samples


def has_signs(data: bytes) -> bool:
    """Return whether the first component of a JPEG 2000 image may be below zero; JPEG and JPEG-LS have no signs.

    Raises:
        ValueError, struct.error: As `shape_of`.
    """
    if data.startswith(b"\xff\xd8"):
        return False
    (depth,) = struct.unpack_from(">B", data, _siz(data) + 42)
    return depth >= 0x80


def depth_of(data: bytes) -> int:
    """Return how many bits the first component of an image has.

    Raises:
        ValueError, struct.error: As `shape_of`.
    """
    if data.startswith(b"\xff\xd8"):
        (depth,) = struct.unpack_from(">B", data, _frame(data)[1] + 2)
        return depth
    (depth,) = struct.unpack_from(">B", data, _siz(data) + 42)
    return depth % 0x80 + 1


def rounds(data: bytes) -> bool:
    """Return whether a pixel may come back as another than was packed, for the transform or a quantisation.

    Raises:
        ValueError, struct.error: As `shape_of`.
    """
    if not data.startswith(b"\xff\xd8"):
        return _wavelet(data) == 0  # 9-7, which is not reversible
    marker, _ = _frame(data)
    if marker != 0xF7:
        return marker not in _LOSSLESS
    place = next(place for marker, place in _segments(data) if marker == 0xDA)
    (components,) = struct.unpack_from(">B", data, place + 2)
    (near,) = struct.unpack_from(">B", data, place + 3 + 2 * components)
    return near > 0


def _siz(data: bytes) -> int:
    """Return where the codestream of a JPEG 2000 image begins, whose second marker is SIZ."""
    start = _codestream(data) if data.startswith(_JP2) else 0
    if data[start : start + 4] != b"\xff\x4f\xff\x51":
        raise ValueError("no codestream")
    return start


def _wavelet(data: bytes) -> int:
    """Return the transformation that the main header of a JPEG 2000 image states."""
    place = _siz(data) + 2
    while True:
        marker, length = struct.unpack_from(">HH", data, place)
        if marker == 0xFF52:
            (transformation,) = struct.unpack_from(">B", data, place + 13)
            return transformation
        if marker <= 0xFF00 or marker == 0xFF90:  # no marker; the first tile
            raise ValueError("no coding style")
        place += 2 + length


def _frame(data: bytes) -> tuple[int, int]:
    """Return the marker of a JPEG's frame header, and where its length stands."""
    for marker, place in _segments(data):
        if marker in _FRAMES:
            return marker, place
    raise ValueError("no frame header")


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the markers of a JPEG, up to its first scan, and where the length of what follows them stands."""
    place = 2
    while True:
        fill, marker = struct.unpack_from(">BB", data, place)
        if fill != 0xFF or marker == 0xD9:  # no marker; the end
            raise ValueError("no frame header")
        if marker == 0xFF:
            place += 1
        elif marker in _ALONE:
            place += 2
        else:
            yield marker, place + 2
            if marker == 0xDA:
                return
            (length,) = struct.unpack_from(">H", data, place + 2)
            place += 2 + length


def _codestream(data: bytes) -> int:
    """Return where the first codestream of a JP2 file begins."""
    place = 0
    while True:
        length, kind = struct.unpack_from(">L4s", data, place)
        content = place + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, content)
            content += 8
        if kind == b"jp2c":
            return content
        if length < 8:  # 0: to the end
            raise ValueError("no codestream")
        place += length
