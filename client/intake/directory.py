"""DICOMDIR: the index of a medium. Read for what it names, and for nothing outside its own folder.

Written here, and not by pydicom's FileSet, since that wants whole media without a fault.

Source: DICOM PS3.3 F.3 (directory records), PS3.10 8 (file ids).
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydicom import dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian

from client.intake.headers import DAMAGED_DICOM, damaged, file_meta
from client.intake.isolation import DecoderPool
from client.intake.memory import header_bytes, within
from client.intake.refusals import Reason, Refused
from client.intake.requests import FileIds, ask_directory
from client.intake.rules import IntakeRules

_NAME = "DICOMDIR"
_BYTES_OF_A_BYTE = 32
"""Memory for each byte of a DICOMDIR, beyond that of any header: pydicom takes 5 to 6 KiB for a file that it names."""


def is_directory(path: Path) -> bool:
    """Return whether a file is called as PS3.10 8.6 wants a DICOMDIR to be called; capitals do not count."""
    return path.name.upper() == _NAME


def named_files(path: Path, rules: IntakeRules) -> Iterator[Path | Reason]:
    """Yield each file that a DICOMDIR names, in its order, or why one cannot be used.

    Media written with small letters are common: where a name is not found, its small letters are tried.

    A decoder's process reads the DICOMDIR; here its names are looked for.

    Raises:
        Refused: The DICOMDIR cannot be read, or is too large.

    Guarantees:
        - never_outside: What is yielded lies in the DICOMDIR's folder, symbolic links followed.
    """
    with DecoderPool(rules) as pool:
        (found,) = pool.answers([ask_directory(path, rules)])
    if isinstance(found, str):
        raise Refused(Reason(found))
    yield from _looked_for(path, found)


def _looked_for(path: Path, named: FileIds) -> Iterator[Path | Reason]:
    root = path.parent.resolve()
    for parts in named:
        if not parts or any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
            yield Reason.OUTSIDE
            continue
        tries = (root.joinpath(*parts), root.joinpath(*(part.lower() for part in parts)))
        try:
            found = next((one for one in tries if one.is_file()), None)
            outside = found is not None and not found.resolve().is_relative_to(root)
        except PermissionError:
            yield Reason.NOT_READABLE
            continue
        except OSError:  # a name that is too long
            found, outside = None, False
        if outside:
            yield Reason.OUTSIDE
        else:
            yield Reason.MISSING if found is None else path.parent / found.relative_to(root)


def file_ids(source: BinaryIO, rules: IntakeRules) -> FileIds:
    """Read what a DICOMDIR names. Runs in a decoder's process.

    Raises:
        Refused: It is damaged or too large.
    """
    try:
        data = source.read(rules.max_bytes + 1)
        if len(data) > rules.max_bytes:
            raise Refused(Reason.TOO_LARGE)
        if file_meta(io.BytesIO(data), rules).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise Refused(Reason.HEADER)  # pydicom would inflate it without a bound, and PS3.10 8.6 knows no such
        with within(header_bytes(rules) + _BYTES_OF_A_BYTE * len(data)):
            records = dcmread(io.BytesIO(data)).get("DirectoryRecordSequence") or []
            return [_parts(value) for record in records if (value := record.get("ReferencedFileID"))]
    except DAMAGED_DICOM as error:
        raise damaged(error, Reason.HEADER) from error


def _parts(value: Any) -> list[str]:
    return [str(part) for part in ([value] if isinstance(value, str) else value)]
