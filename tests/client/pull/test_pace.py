"""Hours and rate, by clocks that the tests turn."""

from datetime import UTC, datetime, time, timedelta

import pytest

from client.pull.pace import Pace, local_now, opens_in_s

NIGHT, DAY = (time(20), time(6)), (time(9), time(17, 30))


@pytest.mark.parametrize(
    ("window", "at", "wait"),
    [
        (None, time(12), 0), (NIGHT, time(20), 0), (NIGHT, time(23, 59), 0), (NIGHT, time(5, 59), 0),
        (NIGHT, time(6), 14 * 3600), (NIGHT, time(19, 30), 1800), (DAY, time(9), 0), (DAY, time(17, 30), 15.5 * 3600),
        (DAY, time(8), 3600),
    ],
)  # fmt: skip
def test_window(window: tuple[time, time] | None, at: time, wait: float) -> None:
    assert opens_in_s(window, datetime.combine(datetime(2024, 3, 1), at, UTC)) == wait


def test_begins_within_hours() -> None:
    now = [datetime(2024, 3, 1, 12, tzinfo=UTC)]
    said: list[str] = []

    def sleep(seconds: float) -> None:
        assert 0 < seconds <= 60
        now[0] += timedelta(seconds=seconds)

    Pace(NIGHT, None, now=lambda: now[0], sleep=sleep).wait_for_window(said.append)
    assert now[0] == datetime(2024, 3, 1, 20, tzinfo=UTC)
    assert said == ["outside the hours of this source: waiting until 20:00"]


def test_not_faster() -> None:
    clock = [100.0]
    pace = Pace(None, 120, tick=lambda: clock[0], sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    for _ in range(11):
        pace.wait_for_turn()
        clock[0] += 0.1  # the work itself
    assert clock[0] == pytest.approx(100 + 10 * 0.5 + 0.1)
    Pace().wait_for_turn()  # no rate, no wait


def test_the_machines_clock_has_a_zone() -> None:
    assert local_now().tzinfo is not None
