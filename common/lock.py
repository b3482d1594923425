"""One process of a kind for each home or run folder, by a lock that ends with its holder."""

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import StorageError
from common.files import make_folder

_LOOK_S = 0.1


@contextmanager
def alone(lock: Path, what: str, wait_s: float = 0.0) -> Generator[int]:
    """Hold a lock file, so that no second `what` is at work there.

    Args:
        lock: The file.
        what: For the message.
        wait_s: How long to wait for one that ends.

    Yields:
        The file's descriptor: a child process that inherits it holds the lock as long as it lives, also after this
        block.

    Raises:
        StorageError: Another process holds it, or it cannot be made.
    """
    with _opened(lock) as handle:
        deadline = time.monotonic() + wait_s
        while not _taken(handle, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise StorageError(f"Another {what} is at work there already ({lock}). Wait for it, or stop it.")
            time.sleep(_LOOK_S)
        yield handle.fileno()


@contextmanager
def beside(lock: Path) -> Generator[None]:
    """Hold a lock file together with others of the same kind: they keep nobody out, and `is_held` tells of them.

    Raises:
        StorageError: It cannot be made.
    """
    with _opened(lock) as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield


def is_held(lock: Path, *, shared: bool = False) -> bool:
    """Return whether a process holds the lock; `shared`: one that is held by `beside`."""
    try:
        with lock.open() as handle:
            return not _taken(handle, fcntl.LOCK_EX if shared else fcntl.LOCK_SH)
    except OSError:
        return False


def _opened(lock: Path) -> IO[str]:
    make_folder(lock.parent, 0o700)
    try:
        return os.fdopen(os.open(lock, os.O_WRONLY | os.O_CREAT, 0o600), "w")
    except OSError as error:
        raise StorageError(f"Could not make {lock}: {error.strerror}. Mend the folder's permissions.") from error


def _taken(handle: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
