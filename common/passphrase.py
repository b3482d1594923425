"""A passphrase, and a secret that is kept under one: scrypt and AES-256-GCM.

What others can do with the file is guess: each guess costs them 128 MiB and the time of it. Beside common/crypto and
common/certificates the only module that imports `cryptography`. Out of scope: what is kept (common/crypto), where the
passphrase comes from (client/passphrase).
"""

import json
import os
import unicodedata
from collections.abc import Mapping
from typing import Any, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from common.errors import PassphraseError, WireError

MIN_CHARACTERS = 12
MAX_PASSPHRASE_BYTES = 1024
FIELDS = frozenset({"kdf", "log2_n", "r", "p", "salt", "cipher", "nonce", "sealed"})
"""The names in what `seal` returns."""

_NAMES = {"kdf": "scrypt", "cipher": "aes-256-gcm"}
_COST = {"log2_n": 17, "r": 8, "p": 1}
_COST_BOUNDS = {"log2_n": (14, 18), "r": (8, 8), "p": (1, 4)}
"""What is read: 16 MiB to 256 MiB of memory, so that a changed file asks for no more."""
_SALT_BYTES, _NONCE_BYTES, _TAG_BYTES, _KEY_BYTES = 16, 12, 16, 32
_MAX_SECRET_BYTES = 4096


@final
class Passphrase:
    """A passphrase as bytes; never printed, never in an environment or an argument.

    Guarantees:
        - redacted_repr: Neither `repr` nor `str` shows anything of it.
        - one_form: The same characters give the same bytes whichever way a keyboard composes them (NFKC).
    """

    def __init__(self, text: str) -> None:
        """Take a passphrase as it was typed.

        Raises:
            PassphraseError: It is empty or longer than 1024 bytes.
        """
        self._bytes = unicodedata.normalize("NFKC", text).encode("utf-8", "surrogateescape")
        if not 0 < len(self._bytes) <= MAX_PASSPHRASE_BYTES:
            raise PassphraseError(
                f"Expected a passphrase of 1 to {MAX_PASSPHRASE_BYTES} bytes, got {len(self._bytes)}. Type it again, "
                "or mend the file that holds it."
            )

    @classmethod
    def from_bytes(cls, content: bytes) -> "Passphrase":
        """Take the content of a file; one line feed at its end is an editor's and does not count.

        Raises:
            PassphraseError: It is no UTF-8, empty or too long.
        """
        try:
            return cls(content.removesuffix(b"\n").removesuffix(b"\r").decode())
        except UnicodeDecodeError:
            pass  # said below, without the content: it is a secret
        raise PassphraseError("Expected a passphrase in UTF-8, the file holds something else. Write it anew.")

    def to_bytes(self) -> bytes:
        """Return it in UTF-8."""
        return self._bytes

    def require_strength(self) -> None:
        """Refuse a new passphrase that is short.

        Raises:
            PassphraseError: It has fewer than 12 characters.
        """
        if len(self._bytes.decode("utf-8", "surrogateescape")) < MIN_CHARACTERS:
            raise PassphraseError(
                f"Expected a new passphrase of at least {MIN_CHARACTERS} characters; four or five words by chance are "
                "good. Nothing was changed."
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Passphrase) and self._bytes == other._bytes

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __repr__(self) -> str:
        return "Passphrase(<redacted>)"


def seal(secret: bytes, passphrase: Passphrase, about: Mapping[str, Any]) -> dict[str, Any]:
    """Encrypt a secret under a passphrase, with a fresh salt and nonce.

    Args:
        secret: At most 4096 bytes.
        passphrase: The passphrase.
        about: Plain values that belong to it; `unseal` fails when they changed.

    Returns:
        Plain values, `FIELDS`.

    Source: RFC 7914 (scrypt); NIST SP 800-38D (GCM).
    """
    salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
    header = {**_NAMES, **_COST, "salt": salt.hex(), "nonce": nonce.hex()}
    sealed = AESGCM(_key(header, passphrase)).encrypt(nonce, secret, _bound(header, about))
    return {**header, "sealed": sealed.hex()}


def unseal(values: Mapping[str, Any], passphrase: Passphrase, about: Mapping[str, Any]) -> bytes:
    """Decrypt what `seal` returned.

    Args:
        values: `FIELDS`; nothing in them is trusted.
        passphrase: The passphrase.
        about: As they were given to `seal`.

    Raises:
        WireError: The values are none of `seal`'s, or cost more than is allowed.
        PassphraseError: The passphrase is another one, or something was changed.

    Guarantees:
        - bounded_cost: Whatever the values say, no more than 256 MiB is asked for.
        - nothing_changed: Values or `about` that were changed do not open.
    """
    _check(values)
    header = {name: values[name] for name in FIELDS - {"sealed"}}
    try:
        return AESGCM(_key(header, passphrase)).decrypt(
            bytes.fromhex(header["nonce"]), bytes.fromhex(values["sealed"]), _bound(header, about)
        )
    except InvalidTag:
        pass  # said below
    raise PassphraseError("The passphrase does not open it, or the file was changed.")


def _key(header: Mapping[str, Any], passphrase: Passphrase) -> bytes:
    n, r, p = 1 << header["log2_n"], header["r"], header["p"]
    return Scrypt(salt=bytes.fromhex(header["salt"]), length=_KEY_BYTES, n=n, r=r, p=p).derive(passphrase.to_bytes())


def _bound(header: Mapping[str, Any], about: Mapping[str, Any]) -> bytes:
    return json.dumps([dict(sorted(header.items())), dict(sorted(about.items()))]).encode()


def _check(values: Mapping[str, Any]) -> None:
    costs = all(type(values[name]) is int and low <= values[name] <= high for name, (low, high) in _COST_BOUNDS.items())
    names = all(values[name] == known for name, known in _NAMES.items())
    sizes = (_is_hex(values["salt"], _SALT_BYTES), _is_hex(values["nonce"], _NONCE_BYTES))
    sealed = isinstance(values["sealed"], str) and len(values["sealed"]) <= 2 * (_MAX_SECRET_BYTES + _TAG_BYTES)
    if not (costs and names and all(sizes) and sealed and _is_hex(values["sealed"], len(values["sealed"]) // 2)):
        raise WireError("It is sealed in another way than this release knows. Use the release that wrote it.")


def _is_hex(value: object, size_bytes: int) -> bool:
    if not isinstance(value, str) or len(value) != 2 * size_bytes:
        return False
    return all(character in "0123456789abcdef" for character in value)
