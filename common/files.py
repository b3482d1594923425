"""Files that matter: written to a temporary name, fsynced, renamed. Out of scope: what is in them."""

import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

from common.errors import ConfigError, StorageError, WireError


def write_atomic(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write `content` so that a reader sees the old file or the new one, never a part.

    Args:
        path: Where the file shall stand; its folder exists.
        content: The whole file.
        mode: Permission bits of the new file.

    Raises:
        StorageError: The disk is full or the folder cannot be written; the old file is untouched.

    Guarantees:
        - old_or_new: After a crash at any line the path holds the old content or the new, whole.
        - old_survives_full_disk: When the disk is full the old content stays and no temporary file is left.

    """
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as handle:
            os.fchmod(handle.fileno(), mode)
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        Path(temporary).replace(path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"Could not write {path.name} ({len(content)} bytes) in {path.parent}: {error.strerror}. "
            "Free space or make the folder writable, then go on."
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it, links followed.

    Raises:
        OSError: It cannot be opened, or is not a regular file.

    Guarantees:
        - neither_waits_nor_endless: A pipe, which would wait for a writer for ever, a socket, a device and a folder are
          refused at once.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file that must not be longer than `limit` bytes.

    Raises:
        StorageError: It cannot be read, or is not a regular file.
        WireError: It is longer; no more than the limit was read of it.
    """
    try:
        with open_regular(path) as handle:
            content = handle.read(limit + 1)
    except OSError as error:
        raise StorageError(f"Could not read {path}: {error.strerror}. Name another file.") from error
    if len(content) > limit:
        raise WireError(f"Expected at most {limit} bytes in {path}, it is longer: another file was named.")
    return content


def read_secret(path: Path, limit: int) -> bytes:
    """Read a secret of at most `limit` bytes that only its owner may read.

    Raises:
        StorageError: It cannot be read, or others than its owner may read or write it.
        WireError: It is longer.
    """
    try:
        content, status = _read_with_status(path, limit)
    except OSError as error:
        raise StorageError(f"Could not read the secret {path}: {error.strerror}. Restore it from a backup.") from error
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise StorageError(
            f"Expected mode 600 for the secret {path}, got {mode:03o}: others can read it. Run `chmod 600 {path}`; "
            "if others use this machine, make a new one."
        )
    if len(content) > limit:
        raise WireError(f"Expected at most {limit} bytes in the secret {path}. Restore it from a backup.")
    return content


def read_credential(name: str, limit: int) -> bytes | None:
    """Read what the service manager handed to this service under a name; None where it handed nothing of that name.

    The folder is $CREDENTIALS_DIRECTORY, which systemd sets for LoadCredential= and LoadCredentialEncrypted=.

    Raises:
        StorageError: It cannot be read, or others than its owner may read or write it.
        WireError: It is longer than `limit` bytes.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return None
    path = Path(folder) / name
    try:
        content, status = _read_with_status(path, limit)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"Could not read {path}: {error.strerror}. See the unit's credentials.") from error
    # systemd keeps root as the owner and lets the service read by an access list, whose mask shows as the group's bits
    of_root = (status.st_uid, status.st_gid) == (0, 0)
    mode = stat.S_IMODE(status.st_mode)
    if mode & (0o037 if of_root else 0o077):
        raise StorageError(f"Expected mode 600 for {path}, got {mode:03o}: others can read it. Run `chmod 600 {path}`.")
    if len(content) > limit:
        raise WireError(f"Expected at most {limit} bytes in {path}. Another file was handed over.")
    return content


def _read_with_status(path: Path, limit: int) -> tuple[bytes, os.stat_result]:
    with open_regular(path) as handle:
        return handle.read(limit + 1), os.fstat(handle.fileno())


def require_outside(folder: Path, file: Path) -> None:
    """Refuse to write a file into a home folder, whose own files it could overwrite.

    Raises:
        ConfigError: It would stand there.
    """
    if file.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"Expected {file} outside the home folder, whose files it could overwrite. Name another file."
        )


def append_durably(path: Path, line: bytes, mode: int = 0o600) -> None:
    """Append one line to a file and fsync it before returning.

    Args:
        path: The file; made with `mode` when it does not exist.
        line: The bytes to append, ending in a newline.
        mode: Permission bits of a new file.

    Raises:
        StorageError: The line could not be written; a part of it may stand at the end of the file.

    """
    new = not path.exists()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode)
        try:
            written = 0
            while written < len(line):
                written += os.write(descriptor, line[written:])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"Could not append {len(line)} bytes to {path}: {error.strerror}. "
            "Free space or make the file writable, then go on."
        ) from error


def make_folder(path: Path, mode: int = 0o755) -> Path:
    """Make a folder and its parents, and return it.

    Raises:
        StorageError: The folder cannot be made or is not a folder.

    """
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"Could not make the folder {path}: {error.strerror}. Choose another folder or mend its permissions."
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise StorageError(f"The folder {path} is not writable. Choose another folder or mend its permissions.")
    return path


def make_own_folder(path: Path) -> Path:
    """Make a folder for its owner alone, and return it; one that stands open already is closed.

    Raises:
        StorageError: It cannot be made, or is open and another user's.
    """
    make_folder(path, 0o700)
    status = path.stat()
    if stat.S_IMODE(status.st_mode) & 0o077:
        if status.st_uid != os.geteuid():
            raise StorageError(f"Others can enter {path}, which is another user's. Name a folder of your own.")
        path.chmod(0o700)
    return path


def sync_folder(path: Path) -> None:
    """Flush a folder's own entries, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
