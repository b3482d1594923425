"""An append-only file of JSON lines, each chained to the one before by SHA-256 and signed by the site key.

Three files in one folder: `NAME.jsonl` (the lines), `NAME.head.json` (a signed count of them, so that a shortened tail
is seen) and `NAME.lock`. Only `client/ledger` and `client/journal` use it. Out of scope: what a line says.

Order of writes: line, fsync, copy of the head, head. A crash in between leaves the file one line ahead of one or both:
accepted, and they are mended. Bytes after the last newline were never acknowledged and are cut off. Everything else
that does not fit is refused. Removing all files at once, or putting older ones back together, cannot be seen from
inside the folder: for that the copy of the head stands elsewhere, and no copy ever says more lines than were written.
"""

import fcntl
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from common.crypto import SigningKey, VerifyKey
from common.errors import StorageError, WireError
from common.files import append_durably, write_atomic

VERSION = 1
MAX_LINE_BYTES = 8192
MAX_FILE_BYTES = 1 << 28

Body = Mapping[str, Any]

_OWN_KEYS = {"version", "number", "previous", "hash", "signature"}
_KEPT_CHAINS = 32
_MEND = "Stop the agent and restore the folder from a backup; do not delete it: what was spent stays spent."


@final
@dataclass(frozen=True)
class _Verified:
    """The lines of a chain that this process verified, and the digest of their bytes."""

    bodies: tuple[Body, ...]
    hashes: tuple[str, ...]
    size_bytes: int
    digest: bytes


_verified: OrderedDict[tuple[str, bytes], _Verified] = OrderedDict()
"""By file and public key. A signature takes a hundred times as long as the digest of its line, and a run of thousands
of rounds opens its chains in each."""


@final
class Chain:
    """A verified chain of signed lines; without the private key it can only be read.

    Guarantees:
        - tampering_is_seen: Truncation, edits, reordering and lines of another key are refused at open.
        - roll_back_is_seen: With a copy of the head, older files put back together are refused at open.
        - no_crash_blocks: Whatever is killed and when, the next open mends what was left, with a copy or without.
        - torn_line: A last line that was cut by a crash is dropped: nobody was told that it stands.
        - one_writer: Between `locked` and its end no other process appends.
        - incremental: Lines once verified are not read again; opened anew in the same process, their bytes are read and
          compared by digest, and verified one by one where any bit of them differs.
    """

    def __init__(
        self, folder: Path, name: str, verify_key: VerifyKey, key: SigningKey | None = None, copy: Path | None = None
    ) -> None:
        """Open and verify a chain; a writer starts an empty one where there is none.

        Args:
            folder: Where the three files stand.
            name: What they are called, and what their signatures are for.
            verify_key: The site's public key.
            key: The site's private key, for a writer.
            copy: A second head outside the folder; a missing one is made with a new chain only.

        Raises:
            StorageError: The files cannot be read, or were changed.
        """
        self._lines, self._head, self._lock = (folder / f"{name}{end}" for end in (".jsonl", ".head.json", ".lock"))
        self._copy = copy
        self._name, self._verify_key, self._key = name, verify_key, key
        self._hashes = [hashlib.sha256(f"fedmedgan {name} v{VERSION}".encode()).hexdigest()]
        self._bodies: list[Body] = []
        self._size_bytes, self._content = 0, hashlib.sha256()
        self._identity = (os.fspath(self._lines.absolute()), verify_key.to_bytes())
        with self.locked():
            pass

    @property
    def bodies(self) -> tuple[Body, ...]:
        """What the verified lines say, in order, without number, hashes and signature."""
        return tuple(self._bodies)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the chain alone, with every line that others appended read and verified.

        Raises:
            StorageError: The files cannot be read, or were changed.
        """
        try:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(
                f"Could not lock {self._lock}: {error.strerror}. Mend the folder's permissions."
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._refresh()
            yield
        finally:
            os.close(descriptor)

    def append(self, body: Body) -> None:
        """Write one line durably, then the head; call it inside `locked`.

        Raises:
            StorageError: There is no private key, or the disk does not take it; a line that stands whole nevertheless
                counts from then on.
        """
        if self._key is None:
            raise StorageError(f"The {self._name} was opened for reading. Open it with the site's private key.")
        number = len(self._bodies) + 1
        content = {**body, "version": VERSION, "number": number, "previous": self._hashes[-1]}
        digest = _hash(self._hashes[-1], content)
        signature = self._key.sign(bytes.fromhex(digest), self._name).hex()
        line = _canonical({**content, "hash": digest, "signature": signature}) + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise StorageError(f"Expected a {self._name} line of at most {MAX_LINE_BYTES} bytes, got {len(line)}.")
        append_durably(self._lines, line)
        self._accept(dict(body), digest, line)
        self._remember()
        self._write_heads()

    def snapshot(self) -> tuple[bytes, bytes]:
        """Return the verified lines and the head as they stand in the files.

        Raises:
            StorageError: The files cannot be read, or were changed.
        """
        with self.locked():
            try:
                lines = self._lines.read_bytes()[: self._size_bytes] if self._bodies else b""
                return lines, self._head.read_bytes()
            except OSError as error:
                raise StorageError(f"Could not read {self._lines.parent}: {error.strerror}. Try again.") from error

    def _refresh(self) -> None:
        """Read what was appended since the last time; mend what a crash leaves behind."""
        heads = {path: self._read_head(path) for path in self._heads}
        tail = self._beyond_known(self._read_tail())
        end = tail.rfind(b"\n") + 1
        for line in tail[:end].splitlines(keepends=True):
            body, digest = self._checked(line)
            self._accept(body, digest, line)
        if end:
            self._remember()
        self._compare(heads)
        if self._key is None:
            return
        if end < len(tail):
            self._cut()
        if set(heads.values()) != {(len(self._bodies), self._hashes[-1])}:
            self._write_heads()

    @property
    def _heads(self) -> tuple[Path, ...]:
        return (self._head,) if self._copy is None else (self._copy, self._head)  # the order of writing

    def _read_tail(self) -> bytes:
        try:
            with self._lines.open("rb") as handle:
                size_bytes = os.fstat(handle.fileno()).st_size
                if not self._size_bytes <= size_bytes <= MAX_FILE_BYTES:
                    raise StorageError(
                        f"Expected {self._lines} of {self._size_bytes} to {MAX_FILE_BYTES} bytes, got {size_bytes}: "
                        f"it was cut or replaced. {_MEND}"
                    )
                handle.seek(self._size_bytes)
                return handle.read(size_bytes - self._size_bytes)
        except FileNotFoundError:
            if self._bodies:
                raise self._broken("the file is gone") from None
            return b""
        except OSError as error:
            raise StorageError(f"Could not read {self._lines}: {error.strerror}. Mend its permissions.") from error

    def _checked(self, line: bytes) -> tuple[Body, str]:
        number, previous = len(self._bodies) + 1, self._hashes[-1]
        try:
            tree = json.loads(line) if len(line) <= MAX_LINE_BYTES else {}
            content = {name: value for name, value in tree.items() if name not in ("hash", "signature")}
            digest, signature = tree["hash"], bytes.fromhex(tree["signature"])
            fits = (content["version"], content["number"], content["previous"]) == (VERSION, number, previous)
            if not fits or digest != _hash(previous, content) or _canonical(tree) + b"\n" != line:
                raise self._broken(f"line {number} was changed, moved or removed")
            self._verify_key.verify(bytes.fromhex(digest), signature, self._name)
        except WireError as error:
            raise self._broken(f"line {number} is not signed by this site's key") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._broken(f"line {number} is not one of its lines") from error
        return {name: value for name, value in content.items() if name not in _OWN_KEYS}, digest

    def _accept(self, body: Body, digest: str, line: bytes) -> None:
        self._bodies.append(body)
        self._hashes.append(digest)
        self._size_bytes += len(line)
        self._content.update(line)

    def _remember(self) -> None:
        known = _Verified(tuple(self._bodies), tuple(self._hashes), self._size_bytes, self._content.digest())
        _verified.pop(self._identity, None)
        _verified[self._identity] = known  # the newest last
        while len(_verified) > _KEPT_CHAINS:
            _verified.popitem(last=False)

    def _beyond_known(self, tail: bytes) -> bytes:
        """Take over what this process verified before, if not a bit of it changed, and return what follows it."""
        known = _verified.get(self._identity)
        if known is None or self._bodies or len(tail) < known.size_bytes:
            return tail
        content = hashlib.sha256(memoryview(tail)[: known.size_bytes])
        if content.digest() != known.digest:
            return tail
        self._bodies, self._hashes = list(known.bodies), list(known.hashes)
        self._size_bytes, self._content = known.size_bytes, content
        return tail[known.size_bytes :]

    def _compare(self, heads: Mapping[Path, tuple[int, str] | None]) -> None:
        count = len(self._bodies)
        if heads[self._head] is None and (count or self._key is None):
            raise self._broken("the head file is missing")
        for path, head in heads.items():
            if head is not None:
                self._compare_one(path, *head)
            elif heads[self._head] is not None:
                raise StorageError(
                    f"The copy {path} of the head of the {self._name} is missing. Mount its disk or restore it from a "
                    f"backup. Only if it is lost, or new in site.toml, and the {self._name} is known to be whole: copy "
                    f"{self._head} there."
                )

    def _compare_one(self, path: Path, number: int, digest: str) -> None:
        count = len(self._bodies)
        name = "head" if path == self._head else f"copy {path} of the head"
        if number > count:
            raise self._broken(
                f"the {name} says {number} lines and the file has {count}: its tail is missing, or an older state was "
                "put back; where there is no newer one, nobody knows what the missing lines said"
            )
        if number < count - 1 or digest != self._hashes[number]:
            raise self._broken(f"the {name}, of {number} lines, does not fit the file of {count}: one was replaced")

    def _read_head(self, path: Path) -> tuple[int, str] | None:
        try:
            with path.open("rb") as handle:
                tree = json.loads(handle.read(MAX_LINE_BYTES))
            head = {"version": VERSION, "number": int(tree["number"]), "hash": str(tree["hash"])}
            self._verify_key.verify(_canonical(head), bytes.fromhex(tree["signature"]), f"{self._name} head")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"Could not read {path}: {error.strerror}. Mend its permissions.") from error
        except (WireError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._broken(f"the head file {path} is not this site's") from error
        return int(tree["number"]), str(tree["hash"])

    def _write_heads(self) -> None:
        if self._key is None:
            return
        head = {"version": VERSION, "number": len(self._bodies), "hash": self._hashes[-1]}
        signature = self._key.sign(_canonical(head), f"{self._name} head").hex()
        for path in self._heads:
            write_atomic(path, _canonical({**head, "signature": signature}) + b"\n", mode=0o600)

    def _cut(self) -> None:
        try:
            descriptor = os.open(self._lines, os.O_WRONLY)
            try:
                os.ftruncate(descriptor, self._size_bytes)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(f"Could not mend {self._lines}: {error.strerror}. Mend its permissions.") from error

    def _broken(self, what: str) -> StorageError:
        return StorageError(f"The {self._name} in {self._lines.parent} cannot be trusted: {what}. {_MEND}")


def _canonical(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _hash(previous: str, content: Mapping[str, Any]) -> str:
    return hashlib.sha256(bytes.fromhex(previous) + _canonical(content)).hexdigest()
