"""The two secrets of the coordinator's machine: the control API's token and the executor's. Never sent elsewhere."""

import hmac
from pathlib import Path

from common.errors import StorageError
from common.files import read_secret as read_secret_file
from server.consortium import MAX_SECRET_BYTES, Consortium

MIN_SECRET_BYTES = 32


def read_token(consortium: Consortium) -> str:
    """Read the token of the control API.

    Raises:
        StorageError: It cannot be read, is too short or no text, or others may read it.
        WireError: It is too long.
    """
    try:
        return _read(consortium.control_token).decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise StorageError(f"{consortium.control_token} is no text. Write 64 random hex digits into it.") from error


def read_secret(consortium: Consortium) -> bytes:
    """Read the secret that link and executor share.

    Raises:
        StorageError: It cannot be read, is too short, or others may read it.
        WireError: It is too long.
    """
    return _read(consortium.superexec_secret)


def is_token(authorization: str, token: str) -> bool:
    """Say whether an `authorization` header carries the token, in a time that does not tell how much of it."""
    return hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode())


def _read(path: Path) -> bytes:
    secret = read_secret_file(path, MAX_SECRET_BYTES)
    if len(secret) < MIN_SECRET_BYTES:
        raise StorageError(
            f"Expected at least {MIN_SECRET_BYTES} bytes in {path}, got {len(secret)}. Write 64 random hex digits into "
            "it and restart the coordinator."
        )
    return secret
