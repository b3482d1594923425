"""Site identities, secret key streams and sealed storage: Ed25519, AES-256-CTR, AES-256-GCM, HKDF and HMAC-SHA256.

Beside common/certificates the only module that imports `cryptography`. Out of scope: what is signed (client/chain,
common/wire) and what the stream is used for (common/noise).
"""

import hmac
import json
import os
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import WireError
from common.files import read_secret, write_atomic

KEY_BYTES = 32
SIGNATURE_BYTES = 64
PSEUDONYM_BYTES = 16
SEAL_BYTES = 28
"""What sealing adds: a nonce of 12 bytes and a tag of 16."""
MAX_KEY_FILE_BYTES = 4096

_SIGNATURE_DOMAIN = b"fedmedgan signature v1"
_STREAM_DOMAIN = b"fedmedgan key stream v1"
_KEY_FILE_VERSION = 1
_KEY_FILE_KIND = "ed25519-private"
_SEALING_KIND = "sealing"
_NONCE_BYTES = 12
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


def save_key(path: Path, key: SigningKey) -> None:
    """Write a private key that only its owner can read.

    Raises:
        StorageError: The file cannot be written.
    """
    content = {"version": _KEY_FILE_VERSION, "kind": _KEY_FILE_KIND, "key": key.to_bytes().hex()}
    write_atomic(path, (json.dumps(content) + "\n").encode(), mode=0o600)


def load_key(path: Path) -> SigningKey:
    """Read a private key that `save_key` wrote.

    Raises:
        StorageError: It cannot be read, or others than its owner may read or write it.
        WireError: It is not a key file of a known version.
    """
    return _parse_key(path, read_secret(path, MAX_KEY_FILE_BYTES))


def _parse_key(path: Path, content: bytes) -> SigningKey:
    try:
        tree = json.loads(content)
        if set(tree) == {"version", "kind", "key"} and (tree["version"], tree["kind"]) == (1, _KEY_FILE_KIND):
            return SigningKey(bytes.fromhex(tree["key"]))
    except (ValueError, TypeError, WireError):
        pass  # said below, without the content: it is a secret
    raise WireError(
        f"{path} is not a private key of version {_KEY_FILE_VERSION} ({_KEY_FILE_KIND}). Restore it from a backup."
    )


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
    content = {"version": _KEY_FILE_VERSION, "kind": _SEALING_KIND, "key": key.to_bytes().hex()}
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
        if set(tree) == {"version", "kind", "key"} and (tree["version"], tree["kind"]) == (1, _SEALING_KIND):
            return SealingKey(bytes.fromhex(tree["key"]))
    except (ValueError, TypeError, WireError):
        pass  # said below, without the content: it is a secret
    raise WireError(f"{path} is not a key of version {_KEY_FILE_VERSION} ({_SEALING_KIND}). Restore it from a backup.")


def _derived(key: bytes, use: bytes) -> bytes:
    info = b"fedmedgan sealing key v1 " + use
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(key)
