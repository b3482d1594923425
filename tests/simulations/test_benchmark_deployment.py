"""The benchmark of a deployed round: its division adds up, its stopwatch finds what it times. Never a time."""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.benchmark import stopwatch
from simulations.benchmark.deployment import ROLES, Case, measure
from simulations.benchmark.report import print_result, write_result
from simulations.benchmark.split import PARTS, Span, greeting, messages, read_spans, rounds, split
from simulations.benchmark.stopwatch import Stopwatch

KNOWN = ("training", "agent", "agent wait", "serialisation", "message", "transport", "checkpoint", "idle", "relayed")
_spans = st.lists(
    st.builds(
        lambda part, thread, since, seconds: Span(part, (1, thread), since, since + seconds),
        st.sampled_from(KNOWN),
        st.integers(0, 3),
        st.floats(0, 10),
        st.floats(0, 5),
    ),
    max_size=20,
)


@settings(deadline=None, derandomize=True)
@given(_spans, st.floats(0, 10), st.floats(0, 10))
def test_adds_up(spans: list[Span], since: float, seconds: float) -> None:
    parts = split(spans, since, since + seconds)
    assert set(parts) == set(PARTS)
    assert all(value >= 0 for value in parts.values())
    assert sum(parts.values()) == pytest.approx(seconds, abs=1e-6)


def test_training_first() -> None:
    spans = [Span("training", (1, 1), 1.0, 3.0), Span("transport", (2, 1), 0.0, 4.0), Span("agent", (3, 1), 2.0, 3.5)]
    parts = split(spans, 0.0, 5.0)
    assert parts["training"] == 2.0
    assert parts["transport"] == pytest.approx(1.0 + 0.25 + 0.5)
    assert parts["agent"] == pytest.approx(0.25)
    assert parts["polling"] == pytest.approx(1.0)


def test_a_relay_that_waits_for_its_agent_counts_only_while_nobody_works() -> None:
    spans = [Span("agent wait", (1, 1), 0.0, 4.0), Span("serialisation", (2, 1), 1.0, 2.0)]
    parts = split(spans, 0.0, 4.0)
    assert (parts["agent"], parts["serialisation"], parts["polling"]) == (3.0, 1.0, 0.0)


def test_rounds_greeting_and_messages_are_found() -> None:
    spans = [
        Span("asked", (1, 1), 0.0, 1.0),
        Span("asked", (1, 1), 2.0, 3.0),
        *(Span("whole checkpoint", (1, 1), end - 0.5, end) for end in (4.0, 7.0, 9.0)),
        Span("whole relayed", (2, 1), 4.0, 6.0),
        Span("whole agent wait", (2, 1), 4.5, 5.0),
        Span("whole relayed", (2, 1), 6.0, 6.5),
    ]
    assert greeting(spans) == (0.0, 1.0)
    assert rounds(spans) == [(4.0, 7.0), (7.0, 9.0)]
    assert messages(spans, 4.0, 7.0) == [1.5]


def test_every_moment_belongs_to_the_innermost_part(tmp_path: Path) -> None:
    watch = Stopwatch(tmp_path / "7.jsonl")
    inner = watch.timed(lambda: time.sleep(0.02), "serialisation")

    def work() -> None:
        time.sleep(0.01)
        inner()

    def values():
        yield 1
        watch.timed(work, "checkpoint")()

    assert list(watch.timed(values, "asked")()) == [1]
    spans = read_spans(tmp_path)
    whole = {span.part: span for span in spans}
    for part in ("checkpoint", "serialisation", "whole checkpoint", "asked"):
        assert whole[part].seconds > 0
    own = sum(span.seconds for span in spans if span.part in ("checkpoint", "serialisation"))
    assert own == pytest.approx(whole["whole checkpoint"].seconds, abs=1e-6)
    assert {span.thread[0] for span in spans} == {7}


def test_all_that_is_timed_exists() -> None:
    for name, functions in stopwatch.TIMED.items():
        for function in functions:
            holder = importlib.import_module(name)
            for part in function.split("."):
                holder = getattr(holder, part)
            assert callable(holder)


def test_modules_are_timed_as_they_are_loaded_and_only_if_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(sys.meta_path)
    stopwatch.wind({})
    assert sys.meta_path == before
    monkeypatch.setattr(sys, "meta_path", before)
    constants = {"server.exchange": {"POLL_S": 7.0}}
    stopwatch.wind({stopwatch.FOLDER: str(tmp_path), stopwatch.CONSTANTS: json.dumps(constants)})
    package = sys.modules["server"] if "server" in sys.modules else importlib.import_module("server")
    loaded = sys.modules.get("server.exchange")
    monkeypatch.setattr(package, "exchange", loaded, raising=False)
    monkeypatch.delitem(sys.modules, "server.exchange", raising=False)
    again = importlib.import_module("server.exchange")
    monkeypatch.setitem(sys.modules, "server.exchange", loaded or again)
    assert again.POLL_S == 7.0
    assert again.ask.__wrapped__ is not again.ask


@pytest.mark.skipif("FEDMEDGAN_E2E" not in os.environ, reason="minutes long: FEDMEDGAN_E2E=short")
@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Flower uses
def test_a_deployment_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {"generator_width": 8, "discriminator_width": 8, "latent_dim": 4, "name": "mlp"}
    result = measure((Case("tiny", 2, tiny, proxy=True, idle_s=2.0),), {"image.size": 28})
    print_result(result)
    write_result(result, tmp_path / "deployment.json")
    written = json.loads((tmp_path / "deployment.json").read_text())
    assert [(row["case"], row["what"], row["windows"]) for row in written["rows"]] == [
        ("tiny", "greeting", 1),
        ("tiny", "round", 2),
    ]
    for row in written["rows"]:
        assert sum(row[f"{part}_s"] for part in PARTS) == pytest.approx(row["total_s"], abs=1e-6)
        assert row["heard"] == 3
        assert row["relay_message_s"] > 0
        assert row["transport_s"] > 0
        assert row["site_bytes"] > 0
        assert row["idle_bytes_per_s"] > 0
        assert all(row[f"{role}_peak_mib"] > 10 for role in ROLES)
    assert written["rows"][1]["training_s"] > 0
    assert set(written["ratios"]) == {"overhead_s_tiny_greeting", "overhead_s_tiny_round"}
    assert "overhead_s_tiny_round = " in capsys.readouterr().out
