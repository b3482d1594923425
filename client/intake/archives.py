"""Zip archives of DICOM files. Members are read into memory, one at a time; nothing is ever unpacked to a disk.

An archive inside an archive is refused, never opened. Out of scope: other kinds of archive; what the members are.
"""

import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, final

from client.intake.records import state_of
from client.intake.refusals import DAMAGED, Reason, Refused
from client.intake.rules import IntakeRules
from common.files import open_regular

MAX_DIRECTORY_BYTES = 64 * 1024**2
"""Of the archive's own directory, which is read whole."""
MAX_MEMBERS = 200_000
"""To list them takes zipfile some seconds and 120 MB."""
MAX_TOTAL_BYTES = 256 * 1024**3
MAX_RATIO = 200
"""Most bytes in the members for each byte of the archive, beyond `FREE_BYTES`."""
FREE_BYTES = 64 * 1024**2

_END_BYTES = 56 + 20 + 22 + 65_536
"""The zip64 record, its locator, and as much of the end as zipfile looks through."""
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Of these zipfile inflates as much as is asked for; of bzip2 and LZMA all that a read of the file gives."""
_NESTED = (b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

# RuntimeError: an encrypted member; a zip version that is too new is a NotImplementedError, also one.
_DAMAGED = (*DAMAGED, RuntimeError, zipfile.BadZipFile)


@final
class Archive:
    """An opened zip archive whose directory is within the limits. A context manager.

    Guarantees:
        - expansion_is_bounded: An archive that says it expands beyond `MAX_RATIO` or `MAX_TOTAL_BYTES`, or whose
          directory is beyond `MAX_DIRECTORY_BYTES`, is refused before a member is read.
        - members_are_counted_before_they_are_listed: An archive of more than `MAX_MEMBERS` is refused before the
          directory is parsed, whatever it says of their number.
        - members_are_bounded: Of a member no more is inflated than its size as stated (4 KiB where that is less), which
          is within the site's limit on a file.
        - members_that_inflate_without_bound_are_refused: A member packed by anything but deflate is never inflated.
        - nesting_is_refused: A member that is an archive itself is refused.
    """

    def __init__(self, path: Path) -> None:
        """Open it and check its directory.

        Raises:
            Refused: It is damaged, or expands beyond the limits.
        """
        try:
            self._file = open_regular(path)
        except PermissionError as error:
            raise Refused(Reason.NOT_READABLE) from error
        except OSError as error:
            raise Refused(Reason.ARCHIVE) from error
        try:
            self._zip = open_zip(self._file)
            size = os.fstat(self._file.fileno()).st_size
        except Refused:
            self._file.close()
            raise
        except _DAMAGED as error:
            self._file.close()
            raise Refused(Reason.ARCHIVE) from error
        total = sum(member.file_size for member in self._zip.infolist())
        if total > min(MAX_TOTAL_BYTES, FREE_BYTES + MAX_RATIO * size):
            self.close()
            raise Refused(Reason.ARCHIVE_LIMITS)

    def __enter__(self) -> "Archive":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
        self._file.close()

    def state(self) -> str:
        """Return the state of the file that is open, whatever stands at its path by now."""
        return state_of(os.fstat(self._file.fileno()))

    def members(self) -> list[tuple[str, bool]]:
        """Return the names of all files in it, and whether each can be had: by a name that no other has, and a file's.

        A folder is left out where it holds nothing.
        """
        infos = [member for member in self._zip.infolist() if member.file_size > 0 or not member.is_dir()]
        return [(one.filename, self._zip.NameToInfo[one.filename] is one and not one.is_dir()) for one in infos]

    def read(self, name: str, rules: IntakeRules) -> bytes:
        """Read a member into memory.

        Raises:
            Refused: It is gone, damaged, encrypted, too large, packed by other means than deflate, or an archive.
        """
        try:
            member = self._zip.getinfo(name)
            if member.file_size > rules.max_bytes:
                raise Refused(Reason.TOO_LARGE)
            if not inflates_in_bounds(member):
                raise Refused(Reason.COMPRESSION)
            with self._zip.open(member) as handle:
                data = handle.read(member.file_size + 1)
        except _DAMAGED as error:
            raise Refused(Reason.ARCHIVE) from error
        if data.startswith(_NESTED):
            raise Refused(Reason.ARCHIVE)
        return data


def open_zip(handle: BinaryIO) -> zipfile.ZipFile:
    """Open a zip archive whose directory is within `MAX_DIRECTORY_BYTES` and `MAX_MEMBERS`.

    Raises:
        Refused: The directory is larger.
        zipfile.BadZipFile: It is damaged, or readers could differ on where its directory is. Other damage raises more.

    Guarantees:
        - the_end_that_is_checked_is_the_one_that_is_read: The size of the directory is taken from the record that
          zipfile goes by.
    """
    place, size = _directory(handle)
    if size > MAX_DIRECTORY_BYTES:
        raise Refused(Reason.ARCHIVE_LIMITS)
    handle.seek(max(0, place))
    # Each member has one, so that there are no more members than these; a name may hold one beside.
    if handle.read(size).count(b"PK\x01\x02") > MAX_MEMBERS:
        raise Refused(Reason.TOO_MANY_MEMBERS)
    return zipfile.ZipFile(handle)


def inflates_in_bounds(member: zipfile.ZipInfo) -> bool:
    """Tell whether a read of so many bytes inflates no more than these."""
    return member.compress_type in _BOUNDED


def _directory(handle: BinaryIO) -> tuple[int, int]:
    """Return where the directory begins, and its size as stated in the record that zipfile goes by.

    It ends where that record begins, whatever stands before the archive.

    Some releases of Python look for the zip64 record where its locator points, some just before the locator: both have
    to be the same place. So a zip64 archive with something before it, or with extensible data, is refused.

    Source: PKWARE APPNOTE 4.3.14 (zip64 end of central directory), 4.3.15 (its locator), 4.3.16 (end of directory).
    """
    size = handle.seek(0, 2)
    handle.seek(max(0, size - _END_BYTES))
    tail = handle.read(_END_BYTES)
    end = tail.rfind(b"PK\x05\x06")
    if not 0 <= end <= len(tail) - 22:
        raise zipfile.BadZipFile
    (directory,) = struct.unpack_from("<L", tail, end + 12)
    stop = size - len(tail) + end
    locator = tail[max(0, end - 20) : end]
    if locator.startswith(b"PK\x06\x07"):
        (place,) = struct.unpack_from("<Q", locator, 8)
        record = tail[max(0, end - 76) : end - 20]
        if not record.startswith(b"PK\x06\x06") or place != stop - 76:
            raise zipfile.BadZipFile
        (directory,) = struct.unpack_from("<Q", record, 40)
        stop = place
    return stop - directory, directory
