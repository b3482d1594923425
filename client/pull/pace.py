"""When a retrieval may begin, and how fast instances may come. Out of scope: the retrieval."""

import time as clocks
from collections.abc import Callable
from datetime import datetime, time, timedelta
from typing import final


def opens_in_s(window: tuple[time, time] | None, now: datetime) -> float:
    """Return how long the window stays shut, seconds; 0 where it is open.

    Args:
        window: From when and until when by the clock on the wall, which may pass midnight; None: always open.
        now: The clock on the wall. Who waits looks anew each minute, so a change of the clock costs nothing.
    """
    if window is None:
        return 0.0
    begin, end = window
    at = now.time().replace(tzinfo=None)
    inside = begin <= at < end if begin < end else at >= begin or at < end
    if inside:
        return 0.0
    day = now.date() if at < begin else now.date() + timedelta(days=1)
    return max(1.0, (datetime.combine(day, begin, now.tzinfo) - now).total_seconds())


def local_now() -> datetime:
    """Return the machine's clock with its time zone."""
    return datetime.now().astimezone()


@final
class Pace:
    """Holds a pull to its hours and its rate; both clocks enter by argument."""

    def __init__(
        self,
        window: tuple[time, time] | None = None,
        per_minute: int | None = None,
        now: Callable[[], datetime] = local_now,
        tick: Callable[[], float] = clocks.monotonic,
        sleep: Callable[[float], None] = clocks.sleep,
    ) -> None:
        """Take the window, the rate, the clock on the wall, a steady clock in seconds, and how to wait."""
        self._window, self._per_minute = window, per_minute
        self._now, self._tick, self._sleep = now, tick, sleep
        self._next = tick()

    def wait_for_window(self, say: Callable[[str], None]) -> None:
        """Wait until a retrieval may begin; say so once.

        Guarantees:
            - begins_within_hours: It returns within the window only.
        """
        said = False
        while (wait := opens_in_s(self._window, self._now())) > 0:
            if not said and self._window is not None:
                say(f"outside the hours of this source: waiting until {self._window[0]:%H:%M}")
                said = True
            self._sleep(min(wait, 60.0))  # the machine may be suspended, or its clock set
        if said:
            self._next = self._tick()

    def wait_for_turn(self) -> None:
        """Wait until the next instance may come.

        Guarantees:
            - not_faster: n instances take at least (n - 1) * 60 / per_minute seconds.
        """
        if self._per_minute is None:
            return
        if (wait := self._next - self._tick()) > 0:
            self._sleep(wait)
        self._next = max(self._next, self._tick()) + 60.0 / self._per_minute
