"""What each site declared with its newest release to a run: `declared.json` of the run folder, for `status`.

A release is charged and signed whether or not its round was kept, so that what it declares counts also where the round
failed, or was never finished. Out of scope: the records of rounds that are real (server/records).
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from common.errors import FedmedganError, StorageError
from common.files import read_bounded, write_atomic
from server.now import Event
from server.records import Failed, Progress, RoundRecord, SiteRelease

MAX_BYTES = 4 * 2**20


@final
@dataclass(frozen=True)
class Declared:
    """What a site declared with a release.

    Attributes:
        round: Of the release.
        release: What it was, and what the site's ledger holds after it.
        at: When it came, seconds since 1970.
    """

    round: int
    release: SiteRelease
    at: float

    @property
    def epsilon_spent(self) -> float:
        """Epsilon of everything that the site was ever charged."""
        return self.release.epsilon_spent

    @property
    def epsilon_allowed(self) -> float:
        """Epsilon by its policy."""
        return self.release.epsilon_allowed


def keep_declared(path: Path) -> Callable[[Event], None]:
    """Return a function that takes each event of a run and keeps what sites declare in it.

    Args:
        path: The file. A disk that does not take it costs what is shown, not the run.

    Guarantees:
        - a_failed_round_counts: What was declared in a round that is not kept stands in the file.
        - an_old_answer_is_not_newer: A stored answer that comes again after a resume changes nothing.
    """
    known = read_declared(path)

    def take(event: Event) -> None:
        number, sites = _releases(event)
        new = {
            name: Declared(number, release, time.time())
            for name, release in sites.items()
            if name not in known or number > known[name].round
        }
        if new:
            known.update(new)
            try:
                write_atomic(path, json.dumps({name: asdict(one) for name, one in sorted(known.items())}).encode())
            except StorageError:
                return

    return take


def read_declared(path: Path) -> dict[str, Declared]:
    """Return what stands in a file, by site; nothing where there is none, or it does not read."""
    try:
        stored = json.loads(read_bounded(path, MAX_BYTES)) if path.exists() else {}
        return {
            str(name): Declared(int(one["round"]), SiteRelease(**one["release"]), float(one["at"]))
            for name, one in stored.items()
        }
    except (FedmedganError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def newest_releases(path: Path) -> list[RoundRecord]:
    """Return each site's newest release as a record of its own: of a round that a kill or a stop broke off, too."""
    return [
        RoundRecord(one.round, {name: one.release}, {}, None, None, 0.0, 0.0, 0)
        for name, one in read_declared(path).items()
    ]


def _releases(event: Event) -> tuple[int, Mapping[str, SiteRelease]]:
    """Return the round of an event and what it holds of releases."""
    if isinstance(event, Failed):
        return event.record.round, event.record.sites
    if isinstance(event, Progress | RoundRecord):
        return event.round, event.sites
    return 0, {}
