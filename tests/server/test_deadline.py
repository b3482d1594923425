"""How long a round waits, over rounds as they may come."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from server.deadline import FACTOR, FIRST_ROUNDS, GRACE_S, LEARNED_FROM, round_deadline_s
from server.records import LATE, RoundRecord, SiteRelease

LONGEST_S = 3600.0
CODES = sorted(LATE | {"policy", "unreachable", "forged-reply"})


def record(number: int, seconds: dict[str, float], refused: dict[str, str] | None = None) -> RoundRecord:
    """Make the record of a round whose sites answered after so many seconds."""
    sites = {name: SiteRelease(100, 1.5, 0.1, 1, 2.0, 10.0, "ab", taken) for name, taken in seconds.items()}
    return RoundRecord(number, sites, refused or {}, 0.5, 2, 0.1, max(seconds.values(), default=0.0), 0)


def rounds(times: list[dict[str, float]]) -> list[RoundRecord]:
    return [record(number, seconds) for number, seconds in enumerate(times)]


@st.composite
def histories(draw: st.DrawFn) -> list[RoundRecord]:
    names = ("a", "b", "c")
    of_one = st.one_of(st.floats(0.0, 5000.0), st.sampled_from(CODES))
    many = draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, of_one)), max_size=12))
    return [
        record(
            number,
            {name: told for name, told in told_by.items() if isinstance(told, float)},
            {name: told for name, told in told_by.items() if isinstance(told, str)},
        )
        for number, told_by in enumerate(many)
    ]


@given(histories(), st.floats(0.1, 5000.0), st.integers(0, 3), st.integers(0, 3))
def test_never_over_the_setting(history: list[RoundRecord], longest_s: float, refinements: int, attempt: int) -> None:
    assert 0 < round_deadline_s(longest_s, refinements, history, attempt) <= longest_s


@given(histories(), st.floats(0.1, 5000.0))
def test_in_time_again(history: list[RoundRecord], longest_s: float) -> None:
    waited = round_deadline_s(longest_s, -1, history)
    slowest = max((site.seconds for one in history[-LEARNED_FROM:] for site in one.sites.values()), default=0.0)
    assert waited > 2 * slowest or waited == longest_s


def _simulate(taken: dict[str, float], times: int, longest_s: float) -> tuple[list[RoundRecord], list[float]]:
    """Let rounds happen: a site is in time, or late, by the deadline that follows from the rounds before."""
    history, waited = rounds([{"fast": taken["fast"]}] * FIRST_ROUNDS), list[float]()
    for _ in range(times):
        waited.append(round_deadline_s(longest_s, -1, history))
        heard = {name: seconds for name, seconds in taken.items() if seconds <= waited[-1]}
        history.append(record(len(history), heard, {name: "timeout" for name in taken if name not in heard}))
    return history, waited


@given(st.floats(0.1, 100.0), st.floats(0.1, 3600.0))
def test_nobody_starves(fast: float, slow: float) -> None:
    """However slow a site is, as long as the setting lets it: it is heard, and from then on in each round."""
    history, _ = _simulate({"fast": fast, "slow": slow}, 300, LONGEST_S)
    heard = [number for number, one in enumerate(history) if "slow" in one.sites]
    assert heard
    assert heard == list(range(heard[0], len(history)))


@given(st.floats(0.1, 100.0))
def test_the_silent_cost_little(fast: float) -> None:
    history, waited = _simulate({"fast": fast, "silent": 1e9}, 200, 1e8)
    usual = FACTOR * fast + GRACE_S
    assert all("silent" in one.refused for one in history[FIRST_ROUNDS:])
    assert sum(waited) <= 5 * usual * len(waited)


def test_a_lost_reply_costs_about_a_rounds_time() -> None:
    minute = rounds([{"a": 60.0, "b": 55.0}] * 4)
    assert round_deadline_s(LONGEST_S, -1, minute) == 140.0
    lost = [*minute, record(4, {"a": 60.0}, {"b": "timeout"})]
    assert round_deadline_s(LONGEST_S, -1, lost) == 280.0
    assert round_deadline_s(LONGEST_S, -1, [*lost, record(5, {"a": 60.0, "b": 55.0})]) == 140.0
    refused = [*minute, record(4, {"a": 60.0}, {"b": "policy"})]  # it answered
    assert round_deadline_s(LONGEST_S, -1, refused) == 140.0


def test_first_rounds_of_a_kind_and_attempts_after_a_failure_wait_as_long_as_the_run_states() -> None:
    history = rounds([{"a": 1.0}] * 6)
    assert [round_deadline_s(50.0, 2, history[:count]) for count in range(7)] == [50, 50, 22, 50, 50, 22, 22]
    assert round_deadline_s(50.0, 2, history, attempt=1) == 50


def test_rounds_of_long_ago_tell_nothing() -> None:
    history = [record(0, {"a": 500.0}), *[replace(one, round=one.round + 1) for one in rounds([{"a": 5.0}] * 5)]]
    assert round_deadline_s(LONGEST_S, -1, history) == FACTOR * 5 + GRACE_S
