"""The inbox: files under keyed names, written whole or not at all, within bounds. Out of scope: what is in them."""

import hashlib
import hmac
import os
import secrets
import shutil
from pathlib import Path
from typing import Final, final

from client.paths import INCOMING
from client.pull.sources import Bounds
from common.errors import ConfigError, StorageError
from common.files import make_folder, read_secret, sync_folder, write_atomic

KEY_BYTES: Final = 32
SUFFIX: Final = ".dcm"
_IDENTITY: Final = "inbox-"


@final
class Inbox:
    """One inbox folder and what a pull may put there. Nothing but the pull writes into it."""

    def __init__(self, folder: Path, key: bytes, bounds: Bounds) -> None:
        """Open an inbox.

        Args:
            folder: Made, mode 700, when it does not exist.
            key: The site's key for names.
            bounds: How much may come.

        Raises:
            StorageError: The folder cannot be made, read or written.
        """
        self._folder, self._key, self._bounds = make_folder(folder, 0o700), key, bounds
        self.incoming = make_folder(folder / INCOMING, 0o700)
        self.identity = _identity(self.incoming)
        self.files = 0
        self.bytes = 0

    def hashed(self, kind: str, uid: str) -> str:
        """Return the keyed name of a UID: who does not hold the key cannot tell which UID it is."""
        return hmac.new(self._key, f"{kind}/{uid}".encode(), hashlib.sha256).hexdigest()[:40]

    def series_name(self, series_uid: str) -> str:
        """Return the keyed name of a series in this inbox: another inbox has another name for it."""
        return self.hashed("series", f"{self.identity}/{series_uid}")

    def path(self, instance_uid: str) -> Path:
        """Return where an instance stands, or would."""
        name = self.hashed("instance", instance_uid)
        return self._folder / name[:2] / f"{name}{SUFFIX}"

    def holds(self, instance_uid: str) -> bool:
        """Return whether an instance is here."""
        return self.path(instance_uid).exists()

    def require_room(self, coming: int = 0) -> None:
        """Refuse to take more than the pull may bring, or the disk may hold.

        Args:
            coming: Bytes that are on their way.

        Raises:
            ConfigError: `max_files` or `max_bytes` is reached.
            StorageError: Less than `free_bytes` would stay free.
        """
        bounds = self._bounds
        if self.files >= bounds.max_files:
            raise ConfigError(
                f"This pull has brought max_files={bounds.max_files} instances. Raise it, or split the list."
            )
        if self.bytes + coming > bounds.max_bytes:
            raise ConfigError(
                f"This pull would bring more than max_bytes={bounds.max_bytes}. Raise it, or split the list."
            )
        free = shutil.disk_usage(self._folder).free
        if free < bounds.free_bytes + coming:
            raise StorageError(
                f"Expected free_bytes={bounds.free_bytes} to stay free on the inbox's disk, {free} bytes are. Free "
                "space or lower free_bytes in pacs.toml, then run again."
            )

    def keep(self, part: Path, instance_uid: str) -> None:
        """Put a file that was received whole under its name.

        Raises:
            StorageError: The disk is full or fails.

        Guarantees:
            - whole_or_not_at_all: After a crash at any line the name holds the whole file or does not exist.
            - nothing_twice: An instance that is here already is left as it is.
            - no_identifier_in_names: Neither name nor folder holds an identifier.
        """
        target = self.path(instance_uid)
        try:
            size = part.stat().st_size
            if not target.exists():
                if not target.parent.exists():
                    target.parent.mkdir(exist_ok=True)
                    target.parent.chmod(0o750)  # whether the group may come here at all, the inbox's own mode says
                part.chmod(0o640)
                descriptor = os.open(part, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                part.rename(target)
                sync_folder(target.parent)
                self.files, self.bytes = self.files + 1, self.bytes + size
        except OSError as error:
            raise StorageError(
                f"Could not keep a file in the inbox: {error.strerror}. Free space or mend permissions, then run again."
            ) from None  # the cause names the file
        finally:
            part.unlink(missing_ok=True)

    def new_part(self) -> Path:
        """Return the path of a new, empty file for what is on its way."""
        path = self.incoming / f"{secrets.token_hex(16)}.part"
        path.touch(0o600)
        return path

    def sweep(self) -> None:
        """Remove the files that an interrupted pull has left half; a folder is none of a pull's and stays.

        Raises:
            StorageError: One cannot be removed.
        """
        try:
            for part in self.incoming.iterdir():
                if part.is_symlink() or not part.is_dir():
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"Could not empty {self.incoming}: {error.strerror}. Mend its permissions, then run again."
            ) from None


def _identity(incoming: Path) -> str:
    """Return what tells an inbox from all others, made on first use.

    It is the name of an empty folder: whoever deletes the files of an inbox after an import leaves it.
    """
    try:
        found = sorted(path.name for path in incoming.iterdir() if path.name.startswith(_IDENTITY) and path.is_dir())
        if found:
            return found[0]
        made = make_folder(incoming / f"{_IDENTITY}{secrets.token_hex(16)}", 0o700)
        sync_folder(incoming)
    except OSError as error:
        raise StorageError(f"Could not read {incoming}: {error.strerror}. Mend its permissions.") from None
    return made.name


def load_key(path: Path) -> bytes:
    """Return the key for names, made on first use, mode 600.

    Raises:
        StorageError: It cannot be read or made, is damaged, or others may read it.
    """
    if not path.exists():
        make_folder(path.parent, 0o700)
        write_atomic(path, secrets.token_bytes(KEY_BYTES), 0o600)
    key = read_secret(path, KEY_BYTES)
    if len(key) != KEY_BYTES:
        raise StorageError(f"Expected {KEY_BYTES} bytes in {path}, got {len(key)}. Restore it from a backup.")
    return key
