"""What a compressed image says of its own form, read before it is decoded: its header may say something else.

Decoders allocate what the codestream states, and pydicom lays out what they give as the DICOM header states it.

Source: ITU-T T.81 B.1.1 (markers) and B.2.2 (frame header), T.87 C.2.2 (JPEG-LS), T.800 A.5.1 (SIZ) and I.4 (boxes of
JP2), T.814 (HTJ2K, which has the same). Out of scope: decoding.
"""

import struct

Shape = tuple[int, int, int]
"""Rows, columns and samples of a pixel."""

_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Markers of a frame header; F7 is JPEG-LS."""
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
        return _of_jpeg(data)
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


def _siz(data: bytes) -> int:
    """Return where the codestream of a JPEG 2000 image begins, whose second marker is SIZ."""
    start = _codestream(data) if data.startswith(_JP2) else 0
    if data[start : start + 4] != b"\xff\x4f\xff\x51":
        raise ValueError("no codestream")
    return start


def _of_jpeg(data: bytes) -> Shape:
    place = 2
    while True:
        fill, marker = struct.unpack_from(">BB", data, place)
        if fill != 0xFF or marker in (0xD9, 0xDA):  # no marker; the end, or the first scan
            raise ValueError("no frame header")
        if marker == 0xFF:
            place += 1
        elif marker in _ALONE:
            place += 2
        elif marker in _FRAMES:
            return struct.unpack_from(">HHB", data, place + 5)
        else:
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
