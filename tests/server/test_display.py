"""What a person sees while a run goes on."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from common.config import Config
from common.config_text import build_config
from common.messages import PACKAGE_VERSION
from server.display import open_display, plain_line
from server.handshake import Handshake
from server.now import Event
from server.records import Failed, Progress, RoundRecord, SiteRelease, Waiting
from tests.function_sites import greeting


def _config(**changes: object) -> Config:
    return build_config({}, {"image.classes": ("clear",), **changes})


def _record(
    number: int, epsilons: dict[str, float], refused: dict[str, str] | None = None, allowed: float = 10.0
) -> RoundRecord:
    sites = {name: SiteRelease(300, 1.5, 0.2, 12, spent, allowed, "ab") for name, spent in epsilons.items()}
    return RoundRecord(number, sites, refused or {}, 0.63 if number else None, None, 0.5, 5.2, 1000)


FOUR = {"a": 7.41, "b": 7.5, "c": 7.58, "d": 7.44}


def _shown(events: list[Event], terminal: bool, config: Config | None = None, width: int = 100) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, height=60, legacy_windows=False)
    with open_display(config or _config(), console) as show:
        for event in events:
            show(event)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


def test_plain_is_one_line_a_round_and_none_for_progress() -> None:
    events: list[Event] = [
        Progress(0, 120, 400, "fit"),
        _record(0, FOUR),
        Progress(1, 2, 4, "sites"),
        *(_record(number, FOUR) for number in (1, 2, 3)),
    ]
    lines = _shown(events, terminal=False).splitlines()
    assert len(lines) == 4
    assert lines[0] == "round 0/8  warm-up  sites 4 in 0 out  epsilon 7.41-7.58 of 10  5.2 s"
    assert lines[3] == "round 3/8  sites 4 in 0 out  epsilon 7.41-7.58 of 10  fakes told 0.63  5.2 s  ETA 26 s"


def test_a_long_fit_is_told_now_and_then_with_the_time_left() -> None:
    events: list[Event] = [Progress(0, step, 4000, "fit", {}, 0.01 * step) for step in range(1, 4001)]
    lines = _shown(events, terminal=False).splitlines()
    assert lines[0].startswith("warm-up: fitting the generator, step 1 of 4000")
    assert lines[1:] == [
        "warm-up: fitting the generator, step 1501 of 4000, ETA 25 s",
        "warm-up: fitting the generator, step 3001 of 4000, ETA 10 s",
    ]


def test_plain_has_few_lines_in_a_long_run_but_tells_who_left() -> None:
    config = _config(**{"federation.rounds": 2000})
    gone = {"d": "unreachable"}
    events: list[Event] = [_record(number, FOUR, gone if 650 <= number < 700 else None) for number in range(2001)]
    lines = _shown(events, terminal=False, config=config).splitlines()
    assert len(lines) == 32 + 1  # the landmarks, 700 among them, and the round in which d left
    assert "round 650/2000  sites 4 in 1 out (d: unreachable)" in "\n".join(lines)


def test_plain_line_is_never_wrapped() -> None:
    refused = {f"site-{number}": f"code-{number}" for number in range(30)}
    assert len(_shown([_record(1, FOUR, refused)], terminal=False, width=20).splitlines()) == 1


def test_plain_is_flushed_line_by_line() -> None:
    class Flushed(io.StringIO):
        seen = ""

        def flush(self) -> None:
            self.seen = self.getvalue()

    stream = Flushed()
    with open_display(_config(), Console(file=stream, force_terminal=False)) as show:
        show(_record(1, FOUR))
        assert stream.seen.startswith("round 1/8")


def test_plain_line_names_refusals_and_differing_limits() -> None:
    refused = {"c": "over-budget", "d": "timeout", "e": "timeout"}
    record = _record(8, {"a": 1.0})
    mixed = RoundRecord(8, record.sites | _record(8, {"b": 1.0}, allowed=3.5).sites, refused, None, None, 0, 61.24, 0)
    assert plain_line(_config(), [mixed]) == (
        "round 8/8  sites 2 in 3 out (c: over-budget, d: timeout, e: timeout)  epsilon 1.00 of 3.5-10  61.2 s"
    )


def test_plain_line_counts_the_codes_of_many_sites() -> None:
    refused = {f"site-{number}": "timeout" if number else "policy" for number in range(5)}
    assert "5 out (policy, 4 timeout)" in plain_line(_config(), [_record(8, {"a": 1.0}, refused)])


def test_bytes_of_a_site_are_shown() -> None:
    record = replace(
        _record(1, FOUR, {"e": "timeout"}), upload_bytes=4 * 1_112_042, download_bytes=5 * 2_224_084, asked=5
    )
    assert "5.2 s  2.22 MB down 1.11 MB up a site  ETA" in plain_line(_config(), [record])
    assert "ETA 36 s, 2.22 MB down 1.11 MB up a site" in _shown([record], terminal=True)


def test_a_run_says_for_whom_it_waits() -> None:
    waiting = Waiting(1, 3, 2, ("st-john", "st-mary"), 118.9)
    line = "waiting for st-john, st-mary: 1 of 3 sites connected, at least 2 needed, for 1 min 59 s at most"
    assert _shown([waiting], terminal=False) == line + "\n"
    assert line in _shown([waiting], terminal=True, width=140)
    assert _shown([Waiting(0, 1, 1, (), 5)], terminal=False).startswith("waiting: 0 of 1 site connected")


@pytest.mark.parametrize(("attempt", "after"), [(1, "it is tried again"), (3, "the run ends")])
def test_an_attempt_in_vain_is_a_line_with_names(attempt: int, after: str) -> None:
    failed = Failed(_record(2, {"a": 1.0}, {"b": "timeout", "c": "malformed-reply"}), 2, attempt, 3)
    assert _shown([failed], terminal=False) == (
        f"round 2 failed, attempt {attempt} of 3: sites 1 in 2 out (b: timeout, c: malformed-reply), "
        f"at least 2 needed; {after}\n"
    )


def test_plain_line_without_sites() -> None:
    assert plain_line(_config(), [_record(0, {})]) == "round 0/8  warm-up  sites 0 in 0 out  5.2 s"


@pytest.mark.parametrize(("rounds", "eta"), [(2, "ETA 5 s"), (13, "ETA 1 min 2 s"), (1001, "ETA 1 h 26 min")])
def test_time_left_counts_training_rounds_only(rounds: int, eta: str) -> None:
    slow = RoundRecord(0, {}, {}, None, None, 0.0, 9999.0, 0)
    line = plain_line(_config(**{"federation.rounds": rounds}), [slow, _record(1, FOUR)])
    assert line.endswith(eta)


def test_terminal_shows_header_rows_and_progress() -> None:
    text = _shown([_record(0, FOUR), _record(1, FOUR), Progress(2, 2, 4, "sites")], terminal=True)
    last = text[text.rindex("fedmedgan") :]
    assert "4 sites, 8 rounds, epsilon 10 (delta 1e-05) per patient, local engine" in last
    rows = [row.split() for row in last.splitlines()]
    assert rows[1] == ["sites", "a", "b", "c", "d", "fakes"]
    assert rows[2] == ["round", "in/out", *["eps", "of", "10"] * 4, "told", "seconds"]
    assert rows[3] == ["warm-up", "4/0", "7.41", "7.50", "7.58", "7.44", "5.2"]
    assert rows[4] == ["1/8", "4/0", "7.41", "7.50", "7.58", "7.44", "0.63", "5.2"]
    assert "round 2: 2 of 4 sites answered, ETA 36 s" in last


def test_terminal_shows_how_far_the_fit_is() -> None:
    text = _shown([Progress(0, 120, 400, "fit", _record(0, FOUR).sites)], terminal=True)
    assert "warm-up: fitting the generator, step 120 of 400" in text


def test_terminal_shows_refusals_in_the_site_or_beside() -> None:
    refused = {"b": "over-budget", "late": "timeout", "later": "timeout"}
    text = _shown([_record(1, FOUR), _record(2, {"a": 8.0}, refused)], terminal=True)
    row = text[text.rindex("fedmedgan") :].splitlines()[4].split()
    assert row == ["2/8", "1/3", "8.00", "over-budget", "0.63", "5.2", "2", "timeout"]


def test_terminal_of_80_columns_keeps_every_column() -> None:
    sites = {f"a-rather-long-name-{number}": 5.0 + number for number in range(4)}
    text = _shown([_record(1, sites), _record(2, {}, dict.fromkeys(sites, "over-budget"))], terminal=True, width=80)
    for part in ("1/8", "4/0", "5.00", "8.00", "0.63", "seconds", "0/4"):
        assert part in text


def test_terminal_shows_a_range_for_many_sites() -> None:
    sites = {f"site-{number}": 5.0 + number for number in range(5)}
    text = _shown([_record(1, sites)], terminal=True)
    assert "5.00-9.00 / 10" in text
    assert "site-0" not in text


def test_terminal_keeps_the_last_rounds() -> None:
    config = _config(**{"federation.rounds": 40})
    text = _shown([_record(number, FOUR) for number in range(41)], terminal=True, config=config)
    last = text[text.rindex("fedmedgan") :]
    assert "26/40" in last
    assert "25/40" not in last
    assert "finished" in last


def test_terminal_takes_names_as_they_are() -> None:
    text = _shown([_record(1, {"[red]x[/red]": 1.0, "[/]": 2.0})], terminal=True)
    assert "x[/red]" in text  # as it is, cut from the left


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_to_show_is_no_error(terminal: bool) -> None:
    empty = RoundRecord(1, {}, {}, None, None, 0.0, 0.0, 0)
    _shown([], terminal)
    _shown([Progress(0, 0, 0, "sites"), empty, Progress(2, 0, 0, "other"), empty], terminal)


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_inside_passes_through(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with pytest.raises(KeyError), open_display(_config(), console):
        raise KeyError("x")


def test_rounds_of_the_warm_up_are_named_and_their_time_tells_nothing_of_the_rest() -> None:
    config = _config(**{"warmup.refinements": 2})
    slow = [RoundRecord(number, _record(0, FOUR).sites, {}, None, None, 0.0, 999.0, 0) for number in range(3)]
    assert plain_line(config, slow[:2]) == "round 1/8  warm-up 2  sites 4 in 0 out  epsilon 7.41-7.58 of 10  999.0 s"
    line = plain_line(config, [*slow, _record(3, FOUR)])
    assert line.startswith("round 3/8  sites")
    assert line.endswith("ETA 26 s")
    text = _shown([*slow[:2], Progress(2, 120, 400, "fit")], terminal=True, config=config)
    last = text[text.rindex("fedmedgan") :]
    assert [row.split()[:2] for row in last.splitlines()[3:5]] == [["warm-up", "1"], ["warm-up", "2"]]
    assert "warm-up 3: fitting the generator, step 120 of 400" in last
    assert "warm-up 3: waiting for the sites" in _shown(slow[:2], terminal=True, config=config)
    assert "round 3: waiting for the sites" in _shown(slow, terminal=True, config=config)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_handshake_is_shown_before_the_rounds(terminal: bool) -> None:
    config = _config()
    said = greeting("st-mary", 200, config)
    shown = _shown([Handshake({"st-mary": said}, {}, True, False), _record(0, FOUR)], terminal, config)
    assert f"st-mary  200 patients  fedmedgan {PACKAGE_VERSION}  will join 8 of 8 rounds" in shown
    assert shown.index("handshake: protocol") < shown.index("st-mary") < shown.rindex("5.2")


@pytest.mark.parametrize("terminal", [False, True])
def test_classes_that_drown_are_told(terminal: bool) -> None:
    record = replace(_record(0, FOUR), unseen=("mass", "rare"))
    assert "NOT LEARNED, drowned in the noise: mass, rare" in _shown([record, _record(1, FOUR)], terminal)
    assert "NOT LEARNED" not in _shown([_record(0, FOUR)], terminal)
