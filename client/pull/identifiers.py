"""Read the four UIDs that say what a DICOM file is, and nothing else of it.

No value but these is read, no sequence is built: a file from the network is walked tag by tag, without recursion, with
bounds on steps and depth. Source: PS3.5 7.1 (elements), 7.5 (sequences), A.5 (deflated); PS3.10 7.1 (file meta).
"""

import io
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, final

from common.files import open_regular

MAX_ELEMENTS: Final = 200_000
MAX_DEPTH: Final = 64
MAX_INFLATED: Final = 16 << 20
"""Bytes of a deflated data set that are looked at."""

_LONG_VR: Final = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_UNDEFINED: Final = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_SYNTAX, _META_CLASS = 0x00020010, 0x00020002
_CLASS, _INSTANCE, _STUDY, _SERIES = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E
_IMPLICIT, _DEFLATED, _BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"


class NotDicom(Exception):
    """The file is not DICOM, or lacks one of the UIDs."""


@final
@dataclass(frozen=True)
class Identifiers:
    """What a file says that it is. Its repr shows nothing."""

    study_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    instance_uid: str = field(repr=False)


@final
@dataclass(frozen=True)
class _Form:
    """How elements are written."""

    implicit: bool
    order: str


def read_identifiers(path: Path) -> Identifiers:
    """Read the identifiers of a DICOM file.

    Raises:
        NotDicom: It is not DICOM, lacks one of them, or does not end its sequences within the bounds.
        OSError: It cannot be read.

    Guarantees:
        - any_bytes: Whatever the bytes, it returns or raises `NotDicom`, after a bounded number of steps.
    """
    with open_regular(path) as file:
        try:
            found = _read(file)
        except (struct.error, UnicodeDecodeError, zlib.error, OverflowError) as error:
            raise NotDicom from error
    if not {_STUDY, _SERIES, _INSTANCE} <= found.keys():
        raise NotDicom
    return Identifiers(found[_STUDY], found[_SERIES], found[_INSTANCE])


def _read(file: BinaryIO) -> dict[int, str]:
    file.seek(128)
    if file.read(4) != b"DICM":
        raise NotDicom
    explicit = _Form(implicit=False, order="<")
    meta = _walk(file, explicit, frozenset({_SYNTAX}), 0x0002FFFF)
    syntax = meta.get(_SYNTAX, "")
    stream: BinaryIO = file
    if syntax == _DEFLATED:
        stream = io.BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(MAX_INFLATED), MAX_INFLATED))
    form = _Form(implicit=syntax == _IMPLICIT, order=">" if syntax == _BIG else "<")
    return _walk(stream, form, frozenset({_INSTANCE, _STUDY, _SERIES}), _SERIES)


def _walk(file: BinaryIO, form: _Form, wanted: frozenset[int], last: int) -> dict[int, str]:
    """Return the wanted values of the outermost level, up to the tag `last`; the stream is left before what follows."""
    found: dict[int, str] = {}
    before = -1
    for _ in range(MAX_ELEMENTS):
        at = file.tell()
        head = file.read(4)
        tag = _tag(head, form) if len(head) == 4 else None
        if tag is None or tag > last:
            file.seek(at)
            return found
        if tag <= before:  # tags ascend (PS3.5 7.1); else a second UID could follow the one that was checked
            raise NotDicom
        before = tag
        inner, length = _length(file, form)
        if tag in wanted:
            if length > 64 + 2:
                raise NotDicom
            found[tag] = file.read(length).decode("ascii").rstrip(" \0")
        elif length == _UNDEFINED:
            _skip(file, inner)
        else:
            file.seek(length, io.SEEK_CUR)
    raise NotDicom


def _skip(file: BinaryIO, form: _Form) -> None:
    """Go behind a sequence of undefined length: its items and theirs are counted, not built."""
    open_forms = [form]  # one for each sequence or item of undefined length that is not ended
    items = [False]  # whether that one is an item, which holds elements; a sequence holds items
    for _ in range(MAX_ELEMENTS):
        form = open_forms[-1]
        tag = _tag(file.read(4), form)
        if tag in (_ITEM, _ITEM_END, _SEQUENCE_END):
            (length,) = struct.unpack(form.order + "I", file.read(4))
            inner = form
        else:
            if not items[-1]:
                raise NotDicom
            inner, length = _length(file, form)
        if tag == (_ITEM_END if items[-1] else _SEQUENCE_END):
            open_forms.pop()
            items.pop()
        elif length == _UNDEFINED:
            open_forms.append(inner)
            items.append(tag == _ITEM)
        else:
            file.seek(length, io.SEEK_CUR)
        if not open_forms:
            return
        if len(open_forms) > MAX_DEPTH:
            raise NotDicom
    raise NotDicom


def _tag(head: bytes, form: _Form) -> int:
    group, element = struct.unpack(form.order + "HH", head)
    return group << 16 | element


def _length(file: BinaryIO, form: _Form) -> tuple[_Form, int]:
    """Return how the value is written inside, and its length in bytes."""
    if form.implicit:
        return form, struct.unpack(form.order + "I", file.read(4))[0]
    vr = file.read(2)
    if vr not in _LONG_VR:
        return form, struct.unpack(form.order + "H", file.read(2))[0]
    file.seek(2, io.SEEK_CUR)
    (length,) = struct.unpack(form.order + "I", file.read(4))
    unknown = vr == b"UN" and length == _UNDEFINED  # written as implicit, little endian (PS3.5 6.2.2)
    return (_Form(implicit=True, order="<") if unknown else form), length
