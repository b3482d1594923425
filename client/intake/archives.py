"""Zip archives of DICOM files. Members are read into memory, one at a time; nothing is ever unpacked to a disk.

An archive inside an archive is refused, never opened. Out of scope: other kinds of archive; what the members are.
"""

import lzma
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, final

from client.intake.refusals import Reason, Refused
from client.intake.rules import IntakeRules

MAX_DIRECTORY_BYTES = 64 * 1024**2
"""Of the archive's own directory, which is read whole: some hundred thousand members."""
MAX_TOTAL_BYTES = 256 * 1024**3
MAX_RATIO = 200
"""Most bytes in the members for each byte of the archive, beyond `FREE_BYTES`."""
FREE_BYTES = 64 * 1024**2

_END_BYTES = 22 + 65_535
_NESTED = (b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    RuntimeError,  # an encrypted member; an unknown compression is a NotImplementedError, also one
    MemoryError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
)


@final
class Archive:
    """An opened zip archive whose directory is within the limits. A context manager.

    Guarantees:
        - expansion_is_bounded: An archive that says it expands beyond `MAX_RATIO` or `MAX_TOTAL_BYTES`, or whose
          directory is beyond `MAX_DIRECTORY_BYTES`, is refused before a member is read.
        - members_are_bounded: Of a member no more is inflated than its size as stated and the site's limit on a file.
        - nesting_is_refused: A member that is an archive itself is refused.
    """

    def __init__(self, path: Path) -> None:
        """Open it and check its directory.

        Raises:
            Refused: It is damaged, or expands beyond the limits.
        """
        try:
            with path.open("rb") as handle:
                size = _check_directory(handle)
            self._zip = zipfile.ZipFile(path)
        except _DAMAGED as error:
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

    def members(self) -> list[tuple[str, bool]]:
        """Return the names of all files in it, and whether each can be told from all others by its name."""
        infos = [member for member in self._zip.infolist() if not member.is_dir()]
        return [(member.filename, self._zip.NameToInfo[member.filename] is member) for member in infos]

    def read(self, name: str, rules: IntakeRules) -> bytes:
        """Read a member into memory.

        Raises:
            Refused: It is gone, damaged, encrypted, too large, or an archive itself.
        """
        try:
            member = self._zip.getinfo(name)
            if member.file_size > rules.max_bytes:
                raise Refused(Reason.TOO_LARGE)
            with self._zip.open(member) as handle:
                data = handle.read(member.file_size + 1)
        except _DAMAGED as error:
            raise Refused(Reason.ARCHIVE) from error
        if data.startswith(_NESTED):
            raise Refused(Reason.ARCHIVE)
        return data


def _check_directory(handle: BinaryIO) -> int:
    """Refuse a directory that is too large to be read whole; return the archive's size in bytes.

    Source: PKWARE APPNOTE 4.3.14 (zip64 end of central directory), 4.3.15 (its locator), 4.3.16 (end of directory).
    """
    size = handle.seek(0, 2)
    handle.seek(max(0, size - _END_BYTES - 20))
    tail = handle.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise Refused(Reason.ARCHIVE)
    (directory,) = struct.unpack("<L", tail[end + 12 : end + 16])
    if end >= 20 and tail[end - 20 : end - 16] == b"PK\x06\x07":
        (place,) = struct.unpack("<Q", tail[end - 12 : end - 4])
        handle.seek(min(place, size))
        (directory,) = struct.unpack("<Q", handle.read(56)[40:48])
    if directory > MAX_DIRECTORY_BYTES:
        raise Refused(Reason.ARCHIVE_LIMITS)
    return size
