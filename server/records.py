"""What the coordinator writes of each round: a line of metrics.jsonl, the source of display, report and recomputation.

Every number in it is public or an output of a charged release. Out of scope: drawing it (server/display, report).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from common.errors import ResumeError
from common.files import append_durably, write_atomic

LATE = frozenset({"timeout", "expired", "flower-3", "flower-4"})
"""Codes of a site that did not answer in time."""


@final
@dataclass(frozen=True)
class SiteRelease:
    """One site's part of a round: what it released and what that cost.

    Attributes:
        declared_patients: Of the site.
        noise_multiplier: Of each step, over the clipping norm.
        sample_rate: Probability of each patient in each step.
        steps: Private steps.
        epsilon_spent: Of everything that the site was ever charged, as it says.
        epsilon_allowed: By its policy, as it says.
        sha256: Digest of what was received; the same stands in the site's journal.
        seconds: From the question to its answer, as the coordinator saw it.
    """

    declared_patients: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    epsilon_spent: float
    epsilon_allowed: float
    sha256: str
    seconds: float = 0.0


@final
@dataclass(frozen=True)
class RoundRecord:
    """One round; round 0 and the refinements after it are the warm-up.

    Attributes:
        round: Its number.
        sites: The sites whose releases were combined.
        refused: The code of each site that gave none.
        fake_accuracy: Mean over the sites of D's accuracy on fakes; None for the warm-up.
        d_steps_per_g_step: Private steps for each generator step; None for the warm-up.
        update_norm: L2 norm of the change of the global weights; for the warm-up the last loss of the fit.
        seconds: Wall time at the coordinator.
        upload_bytes: Bytes of arrays received, all sites together.
        download_bytes: Bytes of arrays sent, all sites together.
        asked: How many sites they were sent to.
        deadline_s: How long answers were waited for at most.
        lost: Whether the round was given up: it changed nothing, and what it cost is spent.
        unseen: Of the warm-up the classes that no sum so far shows above its noise, which the generator does not learn.
    """

    round: int
    sites: Mapping[str, SiteRelease]
    refused: Mapping[str, str]
    fake_accuracy: float | None
    d_steps_per_g_step: int | None
    update_norm: float
    seconds: float
    upload_bytes: int
    download_bytes: int = 0
    asked: int = 0
    deadline_s: float = 0.0
    lost: bool = False
    unseen: tuple[str, ...] = ()

    @property
    def bytes_a_site(self) -> tuple[int, int]:
        """Return the bytes that a site was sent, and that one sent back."""
        return self.download_bytes // max(1, self.asked), self.upload_bytes // max(1, len(self.sites))


@final
@dataclass(frozen=True)
class Waiting:
    """A run that waits for sites.

    Attributes:
        here: How many are connected.
        expected: It waits for so many.
        needed: At least so many there must be.
        missing: Names of the enrolled sites that were not heard; empty within one machine, where nobody is enrolled.
        left_s: How long it will wait at most.
    """

    here: int
    expected: int
    needed: int
    missing: tuple[str, ...]
    left_s: float


@final
@dataclass(frozen=True)
class Failed:
    """An attempt at a round that heard too few sites; nothing of it is kept.

    Attributes:
        record: What it heard.
        needed: At least so many sites there must be.
        attempt: Its number, from 1.
        of: After so many the run ends.
    """

    record: RoundRecord
    needed: int
    attempt: int
    of: int


@final
@dataclass(frozen=True)
class Progress:
    """A step inside a round, for display only: which site was heard, or how far the fit is, and its seconds so far."""

    round: int
    done: int
    of: int
    what: str
    sites: Mapping[str, SiteRelease] = field(default_factory=dict[str, SiteRelease])
    seconds: float = 0.0


def is_landmark(number: int, rounds: int) -> bool:
    """Tell whether a round of a long run is worth a sheet or a line: the first, the last, every twentieth part, 2^k.

    >>> [number for number in range(101) if is_landmark(number, 100)][:9]
    [0, 1, 2, 4, 5, 8, 10, 15, 16]
    """
    return number in (0, rounds) or number & (number - 1) == 0 or number % max(1, rounds // 20) == 0


def read_records(path: Path) -> list[RoundRecord]:
    """Read metrics.jsonl.

    Raises:
        ResumeError: A line does not decode.
    """
    if not path.exists():
        return []
    records: list[RoundRecord] = []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # after the last newline a crash may have left a part
    for number, line in enumerate(lines, start=1):
        try:
            fields: dict[str, Any] = json.loads(line)
            sites = {name: SiteRelease(**site) for name, site in fields.pop("sites").items()}
            unseen = tuple(fields.pop("unseen", ()))
            records.append(RoundRecord(sites=sites, unseen=unseen, **fields))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ResumeError(f"Line {number} of {path} is no round record. Restore the file or start anew.") from error
    return records


def write_records(path: Path, records: list[RoundRecord]) -> None:
    """Write metrics.jsonl anew: every record up to now, so that a resumed run never leaves a round twice."""
    write_atomic(path, b"".join(map(_line, records)))


def append_record(path: Path, record: RoundRecord) -> None:
    """Add one round to metrics.jsonl, durably.

    Raises:
        StorageError: The disk does not take it.
    """
    append_durably(path, _line(record), 0o644)


def _line(record: RoundRecord) -> bytes:
    return json.dumps(asdict(record), allow_nan=False).encode() + b"\n"
