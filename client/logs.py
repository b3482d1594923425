"""One log for each of the site's processes: rotated, for the owner's eyes only."""

import logging
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import final

from common.errors import StorageError
from common.files import make_folder

MAX_BYTES = 5_000_000
KEPT = 4
"""Older files beside the current one."""
MAX_REASON = 4000
"""Characters of one reason in the log: a proposal may name classes of thousands."""


def printable(text: str) -> str:
    """Return a text that may hold parts of a message as one bounded line.

    What came in a message can neither write lines of its own into the log nor command the terminal that shows it.
    """
    line = text[:MAX_REASON].replace("\n", " | ")
    return "".join(letter if letter.isprintable() else "?" for letter in line)


@final
class _OwnersFile(RotatingFileHandler):
    """Makes each new file, after a rotation too, so that only its owner can read it."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).touch(0o600)
        return super()._open()


def log_to(path: Path) -> None:
    """Send this process's log to a file of mode 0600 that is rotated at 5 MB.

    Raises:
        StorageError: The file cannot be written.
    """
    make_folder(path.parent, 0o700)
    try:
        handler = _OwnersFile(path, maxBytes=MAX_BYTES, backupCount=KEPT, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise StorageError(f"Could not write the log {path}: {error.strerror}. Mend its permissions.") from error
    # Opacus configures logging as it is imported; without force the site's own log stays empty
    logging.basicConfig(
        handlers=[handler], level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it notes every question for a message
