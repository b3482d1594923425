"""One process of a kind for each home, by a lock that ends with its holder."""

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from common.errors import StorageError
from common.files import make_folder


@contextmanager
def alone(lock: Path, what: str) -> Generator[None]:
    """Hold a lock file, so that no second `what` runs on the same home.

    Raises:
        StorageError: Another process holds it, or it cannot be made.
    """
    make_folder(lock.parent, 0o700)
    try:
        handle = lock.open("w")
    except OSError as error:
        raise StorageError(f"Could not make {lock}: {error.strerror}. Mend the folder's permissions.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"A {what} runs on this home already ({lock}). Stop it first.") from None
        yield


def is_held(lock: Path) -> bool:
    """Return whether a process holds the lock."""
    try:
        with lock.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
