"""Site identities and secret key streams: Ed25519 signatures, AES-256-CTR and HKDF-SHA256.

Beside common/certificates, passphrase and sealing the only module that imports `cryptography`. Out of scope:
what is signed (client/chain, common/wire) and what the stream is used for (common/noise).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import PassphraseError, WireError
from common.files import read_secret, write_atomic
from common.passphrase import FIELDS, Passphrase, seal, unseal

KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_KEY_FILE_BYTES = 4096

_SIGNATURE_DOMAIN = b"fedmedgan signature v1"
_STREAM_DOMAIN = b"fedmedgan key stream v1"
_KEY_FILE_KIND = "ed25519-private"
_ZEROS = bytes(1 << 20)


def _domain_separated(message: bytes, purpose: str) -> bytes:
    name = purpose.encode()
    return _SIGNATURE_DOMAIN + len(name).to_bytes(2, "big") + name + message


@final
class VerifyKey:
    """The public half of a site's identity."""

    def __init__(self, key: bytes) -> None:
        """Read a raw public key of 32 bytes.

        Raises:
            WireError: It is not 32 bytes long.
        """
        if len(key) != KEY_BYTES:
            raise WireError(
                f"Expected a public key of {KEY_BYTES} bytes, got {len(key)}. Ask the site for its key again."
            )
        self._key = Ed25519PublicKey.from_public_bytes(key)

    @classmethod
    def from_bytes(cls, key: bytes) -> "VerifyKey":
        """Read a raw public key of 32 bytes; raises WireError as the constructor does."""
        return cls(key)

    def to_bytes(self) -> bytes:
        """Return the raw public key, 32 bytes."""
        return self._key.public_bytes_raw()

    def verify(self, message: bytes, signature: bytes, purpose: str) -> None:
        """Check that the holder of the private key signed `message` for `purpose`.

        Raises:
            WireError: The signature is not this key's over this message and purpose.

        Source: RFC 8032, Ed25519.
        """
        try:
            self._key.verify(signature, _domain_separated(message, purpose))
        except InvalidSignature as error:
            raise WireError(
                f"The signature does not fit its {purpose}: it was changed or made by another key. "
                "Compare the key's fingerprint with the pinned one, then ask the sender again."
            ) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifyKey) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __repr__(self) -> str:
        return f"VerifyKey({self.to_bytes().hex()})"


@final
class SigningKey:
    """The private half of a site's identity; never printed, never sent.

    Guarantees:
        - redacted_repr: Neither `repr` nor `str` shows a byte of the key.
        - domain_separated: A signature for one purpose does not verify for another.
    """

    def __init__(self, key: bytes) -> None:
        """Read a raw private key (seed) of 32 bytes.

        Raises:
            WireError: It is not 32 bytes long.
        """
        if len(key) != KEY_BYTES:
            raise WireError(f"Expected a private key of {KEY_BYTES} bytes, got {len(key)}. Restore it from a backup.")
        self._key = Ed25519PrivateKey.from_private_bytes(key)

    @classmethod
    def generate(cls) -> "SigningKey":
        """Make a new key from the operating system's entropy."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def from_bytes(cls, key: bytes) -> "SigningKey":
        """Read a raw private key of 32 bytes; raises WireError as the constructor does."""
        return cls(key)

    def to_bytes(self) -> bytes:
        """Return the raw private key, 32 bytes."""
        return self._key.private_bytes_raw()

    @property
    def verify_key(self) -> VerifyKey:
        """The public key that checks this key's signatures."""
        return VerifyKey(self._key.public_key().public_bytes_raw())

    def sign(self, message: bytes, purpose: str) -> bytes:
        """Return the 64 byte signature of `message` for `purpose`.

        Source: RFC 8032, Ed25519; the signed bytes are a version prefix, the purpose with its length, the message.
        """
        return self._key.sign(_domain_separated(message, purpose))

    def __repr__(self) -> str:
        return "SigningKey(<redacted>)"


@final
class KeyStream:
    """An endless stream of secret bytes: AES-256 in counter mode over a 256-bit key.

    Guarantees:
        - never_reused: A stream never gives the same bytes twice: it only moves on, gives each label once, cannot be
          copied and refuses to be read in a forked process.
        - independent: Streams of different labels, and the stream itself, share no bytes.
        - redacted_repr: Neither `repr` nor `str` shows a byte of the key.

    Source: NIST SP 800-38A section 6.5 (CTR, initial counter zero, one key per stream); RFC 5869 (HKDF).
    """

    def __init__(self, key: bytes) -> None:
        """Start the stream of a 32 byte key.

        Args:
            key: 32 bytes. Two streams of one key are the same stream: a key is used once.

        Raises:
            ValueError: The key is not 32 bytes long.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(f"Expected a stream key of {KEY_BYTES} bytes, got {len(key)}.")
        self._key = bytes(key)
        self._encryptor = Cipher(algorithms.AES(self._key), modes.CTR(bytes(16))).encryptor()
        self._labels: set[str] = set()
        self._process = os.getpid()

    @classmethod
    def from_os(cls) -> "KeyStream":
        """Start a stream that nobody can repeat, keyed by the operating system's entropy."""
        return cls(os.urandom(KEY_BYTES))

    def read(self, size_bytes: int) -> bytes:
        """Return the next `size_bytes` bytes."""
        buffer = bytearray(size_bytes)
        self.fill(buffer)
        return bytes(buffer)

    def fill(self, buffer: bytearray | npt.NDArray[Any]) -> None:
        """Overwrite a buffer with the next bytes of the stream, without a copy.

        Args:
            buffer: Writable and contiguous.

        Raises:
            RuntimeError: This is a forked process, where parent and child would draw the same bytes.
        """
        self._refuse_fork()
        view = memoryview(np.frombuffer(buffer, dtype=np.uint8).data)
        for start in range(0, len(view), len(_ZEROS)):
            part = view[start : start + len(_ZEROS)]
            self._encryptor.update_into(memoryview(_ZEROS)[: len(part)], part)

    def derive(self, label: str) -> "KeyStream":
        """Start an independent stream for one use; what was read from this one does not matter.

        Args:
            label: Names the use; given once per stream.

        Raises:
            ValueError: The label was used before: its stream would repeat.
            RuntimeError: This is a forked process.
        """
        self._refuse_fork()
        if label in self._labels:
            raise ValueError(f"Expected a fresh label, got {label!r} again: the same secret bytes would be used twice.")
        self._labels.add(label)
        info = _STREAM_DOMAIN + label.encode()
        return KeyStream(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(self._key))

    def _refuse_fork(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("Expected a key stream of this process: after a fork both would draw the same bytes.")

    def __repr__(self) -> str:
        return "KeyStream(<redacted>)"


def save_key(path: Path, key: SigningKey, passphrase: Passphrase | None = None) -> None:
    """Write a private key that only its owner can read, and with a passphrase only who knows that too.

    The public half stands in it in clear, so that what only verifies asks nobody.

    Raises:
        StorageError: The file cannot be written.
    """
    content: dict[str, Any] = {"version": 1, "kind": _KEY_FILE_KIND, "key": key.to_bytes().hex()}
    if passphrase is not None:
        about = {"version": 2, "kind": _KEY_FILE_KIND, "public": key.verify_key.to_bytes().hex()}
        content = {**about, **seal(key.to_bytes(), passphrase, about)}
    write_atomic(path, (json.dumps(content) + "\n").encode(), mode=0o600)


def load_key(path: Path, ask: Callable[[], Passphrase] | None = None) -> SigningKey:
    """Read a private key that `save_key` wrote.

    Args:
        path: The file.
        ask: Called once where the key is kept under a passphrase; None: nobody is there to be asked.

    Raises:
        StorageError: It cannot be read, or others than its owner may read or write it.
        WireError: It is not a key file of a known version.
        PassphraseError: It is kept under a passphrase, and there is none to be had, or another one.

    Guarantees:
        - asked_only_where_needed: A key without a passphrase asks for none.
    """
    tree = _read_key_file(path)
    if "key" in tree:
        return SigningKey(bytes.fromhex(tree["key"]))
    if ask is None:
        raise PassphraseError(
            f"{path} is kept under a passphrase, which is not asked for here. See `fedmedgan-site passphrase`."
        )
    about = {name: tree[name] for name in ("version", "kind", "public")}
    try:
        key = SigningKey(unseal({name: tree[name] for name in FIELDS}, ask(), about))
    except (PassphraseError, WireError) as error:
        raise type(error)(f"{path}: {error}") from None
    if key.verify_key.to_bytes().hex() != tree["public"]:
        raise WireError(f"{path} holds another key than it says. Restore it from a backup.")
    return key


def load_verify_key(path: Path) -> VerifyKey:
    """Read the public half of a private key that `save_key` wrote; asks for no passphrase.

    Raises:
        StorageError: It cannot be read, or others than its owner may read or write it.
        WireError: It is not a key file of a known version.
    """
    tree = _read_key_file(path)
    if "key" in tree:
        return SigningKey(bytes.fromhex(tree["key"])).verify_key
    return VerifyKey(bytes.fromhex(tree["public"]))


def is_sealed(path: Path) -> bool:
    """Return whether a private key is kept under a passphrase; raises as `load_verify_key`."""
    return "key" not in _read_key_file(path)


def _read_key_file(path: Path) -> dict[str, Any]:
    """Return the values of a key file, of which `key` (version 1) or `public` (version 2) is 32 bytes in hex."""
    content = read_secret(path, MAX_KEY_FILE_BYTES)
    try:
        tree = json.loads(content)
        names, form = set(tree), (tree["version"], tree["kind"])
        plain = names == {"version", "kind", "key"} and form == (1, _KEY_FILE_KIND)
        sealed = names == {"version", "kind", "public"} | FIELDS and form == (2, _KEY_FILE_KIND)
        if (plain and SigningKey(bytes.fromhex(tree["key"]))) or (sealed and VerifyKey(bytes.fromhex(tree["public"]))):
            return tree
    except (ValueError, TypeError, KeyError, WireError, RecursionError):
        pass  # said below, without the content: it is a secret
    raise WireError(
        f"{path} is not a private key of a known version ({_KEY_FILE_KIND}). Restore it from a backup, or use the "
        "release that wrote it."
    )
