"""What the coordinator's own processes know each other by: two secrets, never sent elsewhere, and the authority."""

import hmac
from pathlib import Path

from common.certificates import validity
from common.errors import StorageError, WireError
from common.files import read_bounded
from common.files import read_secret as read_secret_file
from server.consortium import MAX_RECORD_BYTES, MAX_SECRET_BYTES, Consortium

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


def read_authority_pem(consortium: Consortium) -> bytes:
    """Return the certificate of this federation's authority, in PEM.

    Raises:
        StorageError: It cannot be read, or is no certificate.
    """
    try:
        certificate = read_bounded(consortium.ca_pem, MAX_RECORD_BYTES)
        validity(certificate)
        certificate.decode("ascii")
    except (StorageError, WireError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{consortium.ca_pem} is not there or no certificate. Restore it from a backup: every site pins it."
        ) from error
    return certificate


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
