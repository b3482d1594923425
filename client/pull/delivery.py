"""One series on its way: exactly the instances that were asked for may come, each once. Used by all protocols."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import final

from client.pull.identifiers import NotDicom, read_identifiers
from client.pull.inbox import Inbox
from common.errors import FedmedganError


class Verdict(Enum):
    """What became of an arrival."""

    KEPT = "kept"
    NOT_ASKED = "not-asked-for"
    NOT_DICOM = "not-dicom"
    STOPPED = "stopped"


@final
class Delivery:
    """What may arrive for one series. Arrivals may come from several threads."""

    def __init__(
        self,
        inbox: Inbox,
        study_uid: str,
        series_uid: str,
        instance_uids: Iterable[str],
        wait_for_turn: Callable[[], None] = lambda: None,
        arrived: Callable[[], None] = lambda: None,
    ) -> None:
        """Take where arrivals go, what may arrive, how to keep the pace, and whom to tell of each arrival."""
        self.inbox = inbox
        self._study, self._series, self._asked = study_uid, series_uid, frozenset(instance_uids)
        self._turn, self._arrived = wait_for_turn, arrived
        self._lock = threading.Lock()
        self.refused: Counter[Verdict] = Counter()
        self.too_large: set[str] = set()
        """Instances that are longer than a file may be; not to be asked for again."""
        self.stopped: FedmedganError | None = None
        """Why nothing more may come: a bound of the pull, or the disk."""

    @property
    def missing(self) -> frozenset[str]:
        """Return which instances have not come."""
        return frozenset(uid for uid in self._asked if not self.inbox.holds(uid))

    @property
    def wanted(self) -> frozenset[str]:
        """Return which instances have not come and can."""
        return self.missing - self.too_large

    def drop(self, instance_uid: str) -> None:
        """Note that an instance is too large, which was seen before it was here."""
        if instance_uid in self._asked:
            self.too_large.add(instance_uid)

    def take(self, part: Path, announced: str) -> Verdict:
        """Keep an arrival if it is what was asked for; else throw it away.

        Args:
            part: The whole file, on the inbox's disk. It is gone afterwards.
            announced: The instance that it is said to be.

        Guarantees:
            - only_what_was_asked: A file is kept only if it was announced, and says itself, that it is an instance that
              was asked for, of the series and study that were asked for.
            - stops_at_the_bounds: Beyond the pull's bounds nothing is kept, and `stopped` says why.
        """
        with self._lock:
            verdict = self._judge(part, announced)
            part.unlink(missing_ok=True)
            if verdict is Verdict.KEPT:
                self._arrived()
            else:
                self.refused[verdict] += 1
        if verdict is Verdict.KEPT:
            self._turn()
        return verdict

    def stop(self, error: FedmedganError) -> None:
        """Take nothing more."""
        if self.stopped is None:
            self.stopped = error

    def _judge(self, part: Path, announced: str) -> Verdict:
        if self.stopped is not None:
            return Verdict.STOPPED
        if announced not in self._asked:
            return Verdict.NOT_ASKED
        try:
            found = read_identifiers(part)
        except (NotDicom, OSError):
            return Verdict.NOT_DICOM
        if (found.study_uid, found.series_uid, found.instance_uid) != (self._study, self._series, announced):
            return Verdict.NOT_ASKED
        try:
            self.inbox.require_room()
            self.inbox.keep(part, announced)
        except FedmedganError as error:
            self.stop(error)
            return Verdict.STOPPED
        return Verdict.KEPT
