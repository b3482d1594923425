"""Whether a home's records agree, and the journal in a form that an auditor verifies elsewhere.

What `fedmedgan-site journal verify|export` run; needs the public key only and changes nothing. Out of scope: each chain
on its own (client/chain).
"""

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from client import journal
from client.chain import Chain
from client.channel import unpack_reply
from client.home import Home
from client.ledger import ChargeRequest, read_ledger
from client.site_config import head_copy
from common.crypto import VerifyKey
from common.errors import StorageError, WireError
from common.messages import Kind

EXPORT_FORM = "fedmedgan journal export v1"
MAX_EXPORT_BYTES = 1 << 28

Key = tuple[str, int, Kind]


@final
@dataclass(frozen=True)
class Verified:
    """What was compared, and what does not agree.

    Attributes:
        releases: Lines of the journal.
        charges: Lines of the ledger.
        replies: Stored replies that were compared.
        unreleased: Charges without a release: an interrupted round leaves one behind.
        findings: What does not agree, one sentence each; empty when all is well.
    """

    releases: int
    charges: int
    replies: int
    unreleased: int
    findings: tuple[str, ...]


def verify_home(home: Home, verify_key: VerifyKey) -> Verified:
    """Verify ledger and journal, and hold them and the stored replies against each other.

    Raises:
        StorageError: Ledger or journal cannot be read, or was changed; or the copy of the ledger's head is missing.
        ConfigError: site.toml does not read.

    Guarantees:
        - no_release_without_a_charge: A release that the ledger does not know is a finding.
        - one_release_per_charge: Two releases for one run, round and kind are a finding.
        - stored_is_released: A stored reply with another digest than the journal's or the charge's is a finding.
    """
    ledger = read_ledger(home.ledger, verify_key, head_copy(home))
    charges = {_key(entry.request): entry.request for entry in ledger.entries}
    released = [entry for entry in journal.entries(home.journal, verify_key) if entry.kind is not Kind.HELLO]
    digests = {(entry.run_id, entry.round, entry.kind): entry.sha256 for entry in released}
    counts = Counter((entry.run_id, entry.round, entry.kind) for entry in released)
    findings = [f"{_name(key)} was released without a charge" for key in counts if key not in charges]
    findings += [f"{_name(key)} was released {count} times" for key, count in counts.items() if count > 1]
    stored = sorted(home.replies.glob("*.reply"))
    findings += [found for path in stored if (found := _compare(path, charges, digests)) is not None]
    unreleased = len(charges.keys() - counts.keys())
    return Verified(len(released), len(ledger.entries), len(stored), unreleased, tuple(findings))


def export_journal(folder: Path, verify_key: VerifyKey) -> bytes:
    """Verify a journal and return it as JSON lines that an auditor verifies elsewhere: a header, then the signed lines.

    The header holds the public key and the signed head. Whoever checks compares that key with the one he knows.

    Raises:
        StorageError: It cannot be read, or it was truncated, edited, reordered or signed by another key.
    """
    lines, head = Chain(folder, journal.NAME, verify_key).snapshot()
    header = {"form": EXPORT_FORM, "verify_key": verify_key.to_bytes().hex(), "head": json.loads(head)}
    return json.dumps(header, sort_keys=True).encode() + b"\n" + lines


def read_export(path: Path) -> tuple[VerifyKey, tuple[journal.Entry, ...]]:
    """Verify an exported journal with the public key in it, and with nothing else.

    Raises:
        WireError: It is not an exported journal.
        StorageError: It cannot be read, or was truncated, edited, reordered or signed by another key.

    Guarantees:
        - same_checks: What is refused in a journal is refused in its export.
    """
    try:
        with path.open("rb") as handle:
            first, _, lines = handle.read(MAX_EXPORT_BYTES).partition(b"\n")
    except OSError as error:
        raise StorageError(f"Could not read {path}: {error.strerror}. Check the path.") from error
    try:
        header = json.loads(first)
        if header["form"] != EXPORT_FORM:
            raise ValueError
        verify_key = VerifyKey(bytes.fromhex(header["verify_key"]))
        head = json.dumps(header["head"]).encode()
    except (ValueError, KeyError, TypeError, RecursionError, WireError) as error:
        raise WireError(
            "Expected a file that `fedmedgan-site journal export` wrote. Ask the site for it anew."
        ) from error
    with tempfile.TemporaryDirectory() as folder:  # the same reader as at the site
        Path(folder, f"{journal.NAME}.jsonl").write_bytes(lines)
        Path(folder, f"{journal.NAME}.head.json").write_bytes(head)
        try:
            return verify_key, journal.entries(Path(folder), verify_key)
        except StorageError as error:
            raise StorageError(str(error).replace(folder, str(path))) from error


def _compare(path: Path, charges: Mapping[Key, ChargeRequest], digests: Mapping[Key, str]) -> str | None:
    """Compare one stored reply; one that was stored and not yet released is well."""
    try:
        request_digest, _, frame = path.read_bytes().partition(b"\n")
        reply = unpack_reply(frame)
    except (OSError, WireError):
        return f"the stored reply {path.name} does not read"
    key = (reply.run_id, reply.round, reply.kind)
    if key not in charges:
        return f"the stored reply {path.name} has no charge"
    if charges[key].request_digest.encode() != request_digest:
        return f"the stored reply {path.name} answers another request than the one that was charged"
    if key in digests and digests[key] != journal.content_digest(reply):
        return f"the stored reply {path.name} is not what the journal says was released"
    return None


def _key(request: ChargeRequest) -> Key:
    return request.run_id, request.round, request.kind


def _name(key: Key) -> str:
    return f"round {key[1]} ({key[2]}) of run {key[0]}"
