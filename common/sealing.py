"""What is sealed on this machine: AES-256-GCM under a key of the site, and keyed pseudonyms by HMAC-SHA256.

Out of scope: what is sealed and where it stands (client/intake/vault).
"""

import hmac
import json
import os
from pathlib import Path
from typing import final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.crypto import KEY_BYTES, MAX_KEY_FILE_BYTES
from common.errors import WireError
from common.files import read_secret, write_atomic

PSEUDONYM_BYTES = 16
SEAL_BYTES = 28
"""What sealing adds: a nonce of 12 bytes and a tag of 16."""

_VERSION, _KIND = 1, "sealing"
_NONCE_BYTES = 12


@final
class SealingKey:
    """A secret key for what stays on this machine: it seals bytes and turns names into pseudonyms.

    Guarantees:
        - bound_to_place: What was sealed for one place does not open at another, nor under another key.
        - one_way: A pseudonym tells nothing of a name to whoever does not hold the key.
        - redacted_repr: Neither `repr` nor `str` shows a byte of the key.

    Source: NIST SP 800-38D (AES-256-GCM, random nonces of 96 bits: far fewer than 2^32 a key); RFC 5869; RFC 2104.
    """

    def __init__(self, key: bytes) -> None:
        """Take a secret of 32 bytes.

        Raises:
            WireError: It is not 32 bytes long.
        """
        if len(key) != KEY_BYTES:
            raise WireError(f"Expected a sealing key of {KEY_BYTES} bytes, got {len(key)}. Restore it from a backup.")
        self._key = bytes(key)
        self._cipher = AESGCM(_derived(self._key, b"seal"))
        self._names = _derived(self._key, b"pseudonym")

    @classmethod
    def generate(cls) -> "SealingKey":
        """Make a new key from the operating system's entropy."""
        return cls(os.urandom(KEY_BYTES))

    def to_bytes(self) -> bytes:
        """Return the raw key, 32 bytes."""
        return self._key

    def seal(self, content: bytes, place: bytes) -> bytes:
        """Return the nonce, the encrypted content and its tag; `SEAL_BYTES` more than the content."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, content, place)

    def open(self, sealed: bytes | memoryview, place: bytes) -> bytes:
        """Return what `seal` was given.

        Raises:
            WireError: A bit was changed, or it was sealed for another place or with another key.
        """
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], place)
        except (InvalidTag, ValueError) as error:
            raise WireError(
                "What was sealed does not open: it was changed, moved, or sealed with another key."
            ) from error

    def pseudonym(self, name: bytes, purpose: str) -> bytes:
        """Return 16 bytes that stand for a name: equal for equal names of one purpose."""
        text = purpose.encode()
        return hmac.digest(self._names, len(text).to_bytes(2, "big") + text + name, "sha256")[:PSEUDONYM_BYTES]

    def __repr__(self) -> str:
        return "SealingKey(<redacted>)"


def save_sealing_key(path: Path, key: SealingKey) -> None:
    """Write a sealing key that only its owner can read.

    Raises:
        StorageError: The file cannot be written.
    """
    content = {"version": _VERSION, "kind": _KIND, "key": key.to_bytes().hex()}
    write_atomic(path, (json.dumps(content) + "\n").encode(), mode=0o600)


def load_sealing_key(path: Path) -> SealingKey:
    """Read a key that `save_sealing_key` wrote.

    Raises:
        StorageError: It cannot be read, or others than its owner may read or write it.
        WireError: It is not a key file of a known version.
    """
    content = read_secret(path, MAX_KEY_FILE_BYTES)
    try:
        tree = json.loads(content)
        if set(tree) == {"version", "kind", "key"} and (tree["version"], tree["kind"]) == (1, _KIND):
            return SealingKey(bytes.fromhex(tree["key"]))
    except (ValueError, TypeError, WireError):
        pass  # said below, without the content: it is a secret
    raise WireError(f"{path} is not a key of version {_VERSION} ({_KIND}). Restore it from a backup.")


def _derived(key: bytes, use: bytes) -> bytes:
    info = b"fedmedgan sealing key v1 " + use
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(key)
