"""What a stop may break off, and what not."""

import json
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from client.app import make_app
from common.artefact import load_info
from common.config_text import build_config
from common.errors import FederationError, RefusalCode, StorageError
from common.messages import Arrays, Request, Scalar
from common.seal import Trust
from server import app
from server.app import unbroken
from server.declared import read_declared
from server.now import Event
from server.records import Failed, RoundRecord, SiteRelease
from server.registered import Registered
from server.run_folder import RunFolder, open_run
from simulations.local_grid import LocalGrid
from tests.function_sites import COORDINATOR, SMALL_RUN, follow_sites


def test_a_stop_waits_until_the_results_are_written() -> None:
    written: list[int] = []

    def write() -> None:
        with unbroken():
            signal.raise_signal(signal.SIGINT)
            written.append(1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            write()
        assert written == [1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_a_stop_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with unbroken():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_results_are_written_in_another_thread_too() -> None:
    """Flower's simulation runs the ServerApp there, where signals cannot be handled."""
    written: list[int] = []

    def write() -> None:
        with unbroken():
            written.append(1)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert written == [1]


def _release(index: int, request: Request, _: object) -> tuple[Mapping[str, Scalar], Arrays]:
    fields = {"epsilon_spent": 1.0, "epsilon_allowed": 10.0, "fake_accuracy": 0.5, "d_steps_per_g_step": 1}
    return fields, dict(request.arrays)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def test_a_damaged_checkpoint_is_stepped_over_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = build_config({}, {**SMALL_RUN, "run.resume": True})
    list(follow_sites(tmp_path, build_config({}, dict(SMALL_RUN)), [lambda _: None] * 3, _release))
    _cut(tmp_path / "run" / "checkpoints" / "round-000003.safetensors")
    monkeypatch.setattr(
        app, "federate", lambda grid, job: follow_sites(tmp_path, config, [lambda _: None] * 3, _release)
    )
    folder = open_run(tmp_path / "run", config, resume=True)
    app.run(LocalGrid(make_app(lambda _: lambda _: None), 0), app.Job(config, folder))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "round-000003.safetensors is damaged: going on from round 2, the newest whole checkpoint"
    assert any(line.startswith("round 3/3") for line in lines)


def test_what_sites_declare_is_kept_of_a_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RoundRecord(0, {"a": SiteRelease(100, 1.5, 0.1, 1, 5.6, 10.0, "ab")}, {}, None, None, 0.0, 1.0, 0)

    def fails(*_: object) -> Iterator[Event]:
        yield Failed(record, 2, 3, 3)
        raise FederationError("too few")

    monkeypatch.setattr(app, "federate", fails)
    config = build_config({}, dict(SMALL_RUN))
    folder = open_run(tmp_path / "run", config, resume=False)
    grid = LocalGrid(make_app(lambda _: lambda _: None), 0)
    with pytest.raises(FederationError):
        app.run(grid, app.Job(config, folder, registered=lambda: Registered(Trust(COORDINATOR, {}), {})))
    assert read_declared(folder.declared)["a"].epsilon_spent == 5.6


def _release_that_costs(index: int, request: Request, answer: object) -> tuple[Mapping[str, Scalar], Arrays]:
    fields, arrays = _release(index, request, answer)
    return {**fields, "epsilon_spent": 1.0 + request.round}, arrays


def test_what_a_round_cost_whose_checkpoint_is_lost_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sites answered the last round, and answer no other question of it: it is given up, and was paid for."""
    config = build_config({}, {**SMALL_RUN, "run.resume": True})
    list(follow_sites(tmp_path, build_config({}, dict(SMALL_RUN)), [lambda _: None] * 3, _release_that_costs))
    _cut(tmp_path / "run" / "checkpoints" / "round-000003.safetensors")
    (tmp_path / "run" / "failed.jsonl").write_bytes(b'{"round": 9, "si')  # a crash left a part of a line
    sites = [lambda request: RefusalCode.REPLAYED if request.round == 3 else None] * 3
    events = follow_sites(tmp_path, config, sites, _release_that_costs)
    monkeypatch.setattr(app, "federate", lambda grid, job: events)
    app.run(LocalGrid(make_app(lambda _: lambda _: None), 0), app.Job(config, RunFolder(tmp_path / "run", "")))
    assert json.loads((tmp_path / "run" / "privacy.json").read_bytes())["epsilon_max"] == 4.0


def test_what_a_round_that_is_not_kept_cost_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three rounds is answered, and paid for, by one site alone: that ends the run."""

    def refuses(request: Request) -> RefusalCode | None:
        return RefusalCode.OVER_BUDGET if request.round == 2 else None

    config = build_config({}, {**SMALL_RUN, "federation.min_sites": 2})
    sites = [lambda _: None, refuses, refuses]
    events, folder = follow_sites(tmp_path, config, sites, _release_that_costs), RunFolder(tmp_path / "run", "")
    monkeypatch.setattr(app, "federate", lambda grid, job: events)
    app.run(LocalGrid(make_app(lambda _: lambda _: None), 0), app.Job(config, folder))
    card = json.loads((folder.path / "privacy.json").read_bytes())
    assert card["epsilon_max"] == 3.0
    assert {name: site["epsilon_spent"] for name, site in card["sites"].items()} == {
        "site-0": 3.0,
        "site-1": 2.0,
        "site-2": 2.0,
    }
    assert [release["count"] for release in card["sites"]["site-0"]["releases"]] == [2]
    assert load_info(folder.path).epsilon_by_site["site-0"] == 3.0


def test_a_run_without_a_whole_checkpoint_fails_for_its_storage(tmp_path: Path) -> None:
    config = build_config({}, {**SMALL_RUN, "run.resume": True})
    list(follow_sites(tmp_path, build_config({}, dict(SMALL_RUN)), [lambda _: None] * 3, _release))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        _cut(path)
    job = app.Job(config, open_run(tmp_path / "run", config, resume=True))
    grid = LocalGrid(make_app(lambda _: lambda _: None), 0)
    with pytest.raises(StorageError, match=r"^storage: No checkpoint in .* is whole"):
        app.make_app(job)(grid, Context(1, 1, {}, RecordDict(), {}))
