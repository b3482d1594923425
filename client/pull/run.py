"""The pull itself: lines of the list to series, series to files. Knows no protocol and shows no identifier."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar, final

from client.pull.archive import ADVICE, Archive, Instance, Reason, Refused, Series
from client.pull.asked import Row
from client.pull.delivery import Delivery, Verdict
from client.pull.inbox import Inbox
from client.pull.pace import Pace
from client.pull.state import Count, State
from client.pull.tally import Failure, Tally
from common.errors import PacsError
from common.wording import counted, duration

RETRIES_S: Final = (5.0, 30.0)
"""Waits before what failed is asked for again: twice where the connection broke off, else once."""
MAX_VAIN: Final = 3
"""Of each kind of question so many are asked again in vain in a row; then each is asked once, until one is answered."""
SAY_EVERY_S: Final = 5.0
SHOWN_LINES: Final = 5
_REASONS: Final = {
    Verdict.NOT_ASKED: Reason.NOT_ASKED,
    Verdict.NOT_DICOM: Reason.NOT_DICOM,
}
_ASKED_AGAIN: Final = frozenset((Reason.QUERY, Reason.NOT_LISTED))
_T = TypeVar("_T")


@final
class Pull:
    """One pull from one archive."""

    def __init__(
        self,
        archive: Archive,
        inbox: Inbox,
        state: State,
        pace: Pace,
        say: Callable[[str], None],
        *,
        show_ids: bool = False,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take the archive, where things go, the pace, and how to speak to the person."""
        self._archive, self._inbox, self._state, self._pace = archive, inbox, state, pace
        self._say, self._show_ids, self._wait = say, show_ids, wait
        self._began = self._said = time.monotonic()
        self.tally = Tally()
        self._met: set[str] = set()
        self._vain = Counter[str]()
        self._cut = Counter[str]()

    def resolve(self, rows: Sequence[Row]) -> list[Series]:
        """Ask the archive what it has of the list, each series once, and count it.

        Raises:
            PacsError: The archive is out of reach or refuses us.

        Guarantees:
            - one_line_stops_nothing: A line that the archive cannot answer is counted, and the rest is asked for.
            - no_line_in_silence: A line brings series, or a failure.
            - counted_anew: Each pull asks the archive how many instances a series has.
        """
        found: dict[str, Series] = {}
        for row in rows:
            try:
                studies = self._ask("studies", partial(self._archive.find_studies, row))
            except Refused as error:
                self.tally.failures.append(Failure(row, error.reason, detail=error.detail))
                continue
            before = len(self.tally.failures)
            series = [one for study in studies for one in self._series(row, study)]
            if not series and len(self.tally.failures) == before:
                self.tally.failures.append(Failure(row, Reason.NOT_FOUND))
            for one in series:
                if one.uid not in found and (known := self._counted(one)) is not None:
                    found[one.uid] = known
        self.tally.expected = sum(series.stated or 0 for series in found.values())
        self.tally.series = len(found)
        return list(found.values())

    def describe(self, rows: Sequence[Row], found: Sequence[Series]) -> None:
        """Say what a pull would bring, a line of the list each."""
        for row in rows:
            series = [one for one in found if one.row is row]
            here = sum(self._known(one) for one in series)
            count = sum(one.stated or 0 for one in series)
            self._say(f"{self._name(row)}: {len(series)} series, {counted(count, 'instance')}, {here} of them here")

    def fetch(self, found: Sequence[Series]) -> None:
        """Bring all series; those that are whole are not asked for again.

        Raises:
            PacsError: The archive went away, or refuses us.
            ConfigError: A bound of pacs.toml is reached.
            StorageError: The disk is full.

        Guarantees:
            - resumes: After a crash at any line the next pull asks only for what is not here.
            - counts_what_is_here: However it ends, what earlier pulls brought counts as here.
            - one_series_stops_nothing: A series that the archive cannot send is counted, and the rest is fetched.
        """
        self._began = self._said = time.monotonic()
        self._inbox.require_room()
        try:
            for series in found:
                self._one(series)
        finally:
            for series in found:  # those that an interruption, or the hours, did not let come up
                if series.uid not in self._met:
                    self.tally.were_here += min(self._known(series), series.stated or 0)
            self._state.save()

    def tell_failures(self) -> None:
        """Say what failed, why, and what to do."""
        for reason in Reason:
            failures = [failure for failure in self.tally.failures if failure.reason is reason]
            if failures:
                self._say(self._told(reason, failures))

    def tell_counts(self) -> None:
        """Say how much came."""
        tally, seconds = self.tally, time.monotonic() - self._began
        self._say(
            f"expected {counted(tally.expected, 'instance')} of {tally.series} series; {tally.were_here} were here, "
            f"{tally.received} received ({self._inbox.bytes / 1e6:.1f} MB in {seconds:.0f} s), {tally.missing} missing"
        )

    def _one(self, series: Series) -> None:
        name = self._inbox.series_name(series.uid)
        stated = series.stated or 0
        if self._state.is_whole(name, stated):
            self._met.add(series.uid)
            self.tally.were_here += stated
            return
        self._pace.wait_for_window(self._say)
        try:
            instances = self._instances(series)
        except Refused as error:
            self.tally.failures.append(Failure(series.row, error.reason, stated, error.detail))
            return
        unnamed = max(stated - len(instances), 0)
        if unnamed:
            self.tally.failures.append(Failure(series.row, Reason.NOT_LISTED, unnamed))
        elif len(instances) > stated:  # they have come since
            self.tally.expected += len(instances) - stated
            series = replace(series, stated=len(instances))
        uids = [instance.uid for instance in instances]
        delivery = Delivery(self._inbox, series.study_uid, series.uid, uids, self._pace.wait_for_turn, self._arrived)
        self._met.add(series.uid)
        self.tally.were_here += len(uids) - len(delivery.missing)
        refused: Refused | None = None
        try:
            if delivery.missing:
                self._inbox.require_room()
                self._persist(
                    "files",
                    lambda: self._archive.fetch(
                        series, [one for one in instances if one.uid in delivery.wanted], delivery
                    ),
                )
        except Refused as error:
            refused = error
        left = len(delivery.missing)
        self._state.put(name, Count(expected=len(uids) + unnamed, received=len(uids) - left))
        self._note(series, delivery, left, refused)

    def _persist(self, kind: str, call: Callable[[], _T]) -> _T:
        """Call, and call again after a while where the connection breaks off; soon once, where it always does."""
        for wait in RETRIES_S if self._cut[kind] < MAX_VAIN else ():
            try:
                answer = call()
            except Refused as error:
                if error.reason is not Reason.CUT:
                    self._cut[kind] = 0
                    raise
                self._say(f"the connection broke off; trying again in {wait:.0f} s")
            except PacsError as error:
                if not self._cut:  # nothing was ever answered: that may be the settings
                    raise
                self._say(f"{error} Trying again in {wait:.0f} s.")
            else:
                self._cut[kind] = 0
                return answer
            self._wait(wait)
        self._cut[kind] += 1
        answer = call()
        self._cut[kind] = 0
        return answer

    def _ask(self, kind: str, call: Callable[[], _T]) -> _T:
        """Ask, and once more where the answer cannot be all; an archive that always answers so is soon asked once."""
        return self._persist(kind, partial(self._ask_for_all, kind, call))

    def _ask_for_all(self, kind: str, call: Callable[[], _T]) -> _T:
        try:
            answer = call()
        except Refused as error:
            if error.reason not in _ASKED_AGAIN:
                raise
            self._vain[kind] += 1
            if self._vain[kind] > MAX_VAIN:
                raise
            self._say(f"{error.reason}; asking again in {RETRIES_S[0]:.0f} s")
            self._wait(RETRIES_S[0])
            answer = call()
        self._vain[kind] = 0
        return answer

    def _series(self, row: Row, study_uid: str) -> list[Series]:
        """Return the series of a study that a line asks for; count it where it has none, or one without a UID."""
        try:
            found = self._ask("series", partial(self._archive.find_series, row, study_uid))
        except Refused as error:
            self.tally.failures.append(Failure(row, error.reason, detail=error.detail))
            return []
        asked = [one for one in found if row.modality in ("", one.modality)]
        if any(not one.uid for one in asked):
            self.tally.failures.append(Failure(row, Reason.NOT_LISTED, detail="it names a series without a UID"))
        return [one for one in asked if one.uid]

    def _instances(self, series: Series) -> list[Instance]:
        """Return the instances of a series; of answers that name too few, all that any named.

        Raises:
            Refused: The archive does not answer, or names none.
        """
        named: dict[str, Instance] = {}

        def ask() -> None:
            named.update((one.uid, one) for one in self._archive.find_instances(series))
            if len(named) < (series.stated or 1):
                raise Refused(Reason.NOT_LISTED)

        try:
            self._ask("instances", ask)
        except Refused as error:
            if not named or error.reason is not Reason.NOT_LISTED:
                raise
        return list(named.values())

    def _counted(self, series: Series) -> Series | None:
        """Return a series with its count of instances; an archive that does not state it is asked for all of them."""
        if series.stated is not None:
            return series
        try:
            return replace(series, stated=len(self._instances(series)))
        except Refused as error:
            self.tally.failures.append(Failure(series.row, error.reason, detail=error.detail))
            return None

    def _note(self, series: Series, delivery: Delivery, left: int, refused: Refused | None) -> None:
        """Count what did not come, and what came and was thrown away."""
        counts = {reason: delivery.refused[verdict] for verdict, reason in _REASONS.items()}
        counts[Reason.TOO_LARGE] = len(delivery.too_large)
        for reason, count in counts.items():
            if count:
                part = min(count, left)
                self.tally.failures.append(Failure(series.row, reason, part))
                left -= part
        if left or refused is not None:
            reason, detail = (refused.reason, refused.detail) if refused is not None else (Reason.NOT_SENT, "")
            self.tally.failures.append(Failure(series.row, reason, left, detail))

    def _known(self, series: Series) -> int:
        count = self._state.count(self._inbox.series_name(series.uid))
        return count.received if count is not None else 0

    def _arrived(self) -> None:
        self.tally.received += 1
        now = time.monotonic()
        if now - self._said < SAY_EVERY_S:
            return
        self._said = now
        tally = self.tally
        rate = tally.received / max(now - self._began, 1e-6)
        done = tally.were_here + tally.received
        left = duration(tally.missing / rate)
        self._say(f"{done} of {tally.expected} instances, {rate * 60:.0f} a minute, {left} left")

    def _told(self, reason: Reason, failures: Sequence[Failure]) -> str:
        rows = list(dict.fromkeys(self._name(failure.row) for failure in failures))
        named = ", ".join(rows[:SHOWN_LINES]) + (
            f" and {len(rows) - SHOWN_LINES} more" if len(rows) > SHOWN_LINES else ""
        )
        details = sorted({failure.detail for failure in failures if failure.detail})[:SHOWN_LINES]
        missing = sum(failure.missing for failure in failures)
        instances = f", {counted(missing, 'instance')}" if missing else ""
        return f"{reason}: {'; '.join([ADVICE[reason], *details])} ({named}{instances})"

    def _name(self, row: Row) -> str:
        return f"line {row.line}" + (f" ({row.shown})" if self._show_ids else "")
