"""The two secrets of the coordinator's machine: the control API's token and the executor's. Never sent elsewhere."""

import hmac
from pathlib import Path

from common.errors import StorageError
from server.consortium import Consortium

MIN_SECRET_BYTES = 32


def read_token(consortium: Consortium) -> str:
    """Read the token of the control API.

    Raises:
        StorageError: It cannot be read, is too short or no text, or others may read it.
    """
    try:
        return _read(consortium.control_token).decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise StorageError(f"{consortium.control_token} is no text. Write 64 random hex digits into it.") from error


def read_secret(consortium: Consortium) -> bytes:
    """Read the secret that link and executor share.

    Raises:
        StorageError: It cannot be read, is too short, or others may read it.
    """
    return _read(consortium.superexec_secret)


def is_token(authorization: str, token: str) -> bool:
    """Say whether an `authorization` header carries the token, in a time that does not tell how much of it."""
    return hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode())


def _read(path: Path) -> bytes:
    try:
        open_to_others, secret = path.stat().st_mode & 0o077, path.read_bytes()
    except OSError as error:
        raise StorageError(f"Could not read {path}: {error.strerror}. Restore it from a backup.") from error
    if open_to_others or len(secret) < MIN_SECRET_BYTES:
        raise StorageError(
            f"Expected mode 600 and at least {MIN_SECRET_BYTES} bytes of {path}. Write a new random one, "
            "run chmod 600, and restart the coordinator."
        )
    return secret
