"""Runs submitted, followed and ended: what is refused, and what is said."""

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from common.config_text import build_config, read_config
from common.errors import ExitCode
from common.files import make_folder, write_atomic
from common.lock import alone, is_held
from server import control, operate
from server.consortium import Consortium
from server.control import RunStatus
from server.rounds import initial_pair
from server.run_folder import RunFolder
from server.start import read_start, save_start
from server.status import under_way
from tests.coordinator_home import enrol, exit_of

PATIENCE_S = 60.0


def begun(hub: Path, name: str) -> Path:
    """Make the folder of a run that has begun."""
    folder = make_folder(hub / "runs" / name)
    for file in ("config.toml", "run.json"):
        write_atomic(folder / file, b"")
    return folder


def test_resume_says_where_there_is_nothing_to_go_on_with(
    hub: Path, runs: list[RunStatus], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of("resume", hub, hub.parent) == ExitCode.RESUME
    assert "is no folder of a run" in capsys.readouterr().err
    folder = begun(hub, "run-0001")
    runs.clear()  # as after a stop: the link knows of nothing, the process writes still
    with alone(folder / "run.lock", "run"):
        assert exit_of("resume", hub, folder) == ExitCode.FEDERATION
        assert "its process has not ended yet" in capsys.readouterr().err
    (folder / "report.html").touch()
    assert exit_of("resume", hub, folder) == ExitCode.RESUME
    assert "is complete" in capsys.readouterr().err


def test_a_second_run_beside_one_under_way_is_refused(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("run", hub, hub.parent / "run.toml") == ExitCode.FEDERATION
    said = capsys.readouterr().err
    assert "run-0001 is under way with these sites" in said
    assert f"fedmedgan-coordinator stop {hub} run-0001" in said
    assert not (hub / "runs" / "run-0002").exists()
    write_atomic(make_folder(hub / "runs" / "run-0000") / "config.toml", b"")
    assert exit_of("resume", hub, "run-0000") == ExitCode.FEDERATION
    assert "run-0001 is under way" in capsys.readouterr().err


def test_a_run_whose_process_is_gone_is_not_under_way(hub: Path) -> None:
    run = RunStatus(7, "running", "", "", hub / "runs" / "run-0001", "")
    over = RunStatus(8, "finished", "completed", "", hub / "runs" / "run-0002", "")
    assert under_way([run, over], ()) == [run]
    assert under_way([run, over], {7}) == []


def test_a_run_that_is_not_there_is_one_fault_for_stop_and_resume(hub: Path) -> None:
    assert exit_of("stop", hub, "run-0009") == exit_of("resume", hub, "run-0009") == ExitCode.RESUME


def test_a_run_is_looked_for_and_submitted_under_one_lock(
    hub: Path, runs: list[RunStatus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else of two within seconds each would find nothing under way."""
    lock, held = Consortium(hub).submitting, list[bool]()

    def look(*_: object) -> list[RunStatus]:
        held.append(is_held(lock))
        return []

    def submit(*_: object, **__: object) -> int:
        held.append(is_held(lock))
        return 8

    monkeypatch.setattr(control, "list_runs", look)
    monkeypatch.setattr(control, "submit", submit)
    begun(hub, "run-0001")
    assert exit_of("resume", hub, "run-0001", "--detach") == ExitCode.OK
    assert exit_of("run", hub, hub.parent / "run.toml", "--detach") == ExitCode.OK
    assert (held, is_held(lock)) == ([True] * 4, False)


@pytest.mark.parametrize("state", ["pending", "starting"])
def test_the_second_of_two_resumes_within_seconds_is_refused(
    hub: Path, runs: list[RunStatus], state: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    connected, submitted, codes = threading.Event(), list[object](), list[int]()

    def connect(_: object) -> nullcontext[None]:
        connected.set()
        return nullcontext()

    monkeypatch.setattr(control, "connect", connect)
    monkeypatch.setattr(control, "submit", lambda *given, **_: submitted.append(given))
    folder = begun(hub, "run-0001")
    runs.clear()
    second = threading.Thread(target=lambda: codes.append(exit_of("resume", hub, "run-0001", "--detach")))
    with alone(Consortium(hub).submitting, "the first"):
        second.start()
        assert connected.wait(PATIENCE_S)
        runs.append(RunStatus(9, state, "", "", folder, ""))
    second.join(PATIENCE_S)
    assert (codes, submitted) == ([ExitCode.FEDERATION], [])
    assert "run-0001 is under way already" in capsys.readouterr().err


def test_a_run_of_which_only_the_link_believes_that_it_runs_is_taken_up(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after the coordinator went down around it; not while its process lives."""
    monkeypatch.setattr(control, "submit", lambda *_, **__: 8)
    begun(hub, "run-0001")
    with alone(Consortium(hub).run_lock(7), "run"):
        assert exit_of("resume", hub, "run-0001", "--detach") == ExitCode.FEDERATION
    assert "run-0001 is under way already" in capsys.readouterr().err
    Consortium(hub).run_lock(7).unlink()
    assert exit_of("resume", hub, "run-0001", "--detach") == ExitCode.OK


def stopped(
    hub: Path, runs: list[RunStatus], monkeypatch: pytest.MonkeyPatch, outcome: str = "stopped", looks: int = 3
) -> list[str]:
    """Stop run-0001, whose process is seen `looks` times before it has ended; return what the link was asked."""
    folder, asked = begun(hub, "run-0001"), list[str]()
    left = iter([True] * looks)

    def has_process(*_: object) -> bool:
        asked.append("look")
        return next(left, False)

    def read(*_: object) -> RunStatus:
        asked.append("read")
        return RunStatus(7, "finished", outcome, "a reason", folder, runs[0].started)

    monkeypatch.setattr(operate, "is_held", has_process)
    monkeypatch.setattr(control, "stop_run", lambda *_: asked.append("stop"))
    monkeypatch.setattr(control, "read_run", read)
    assert exit_of("stop", hub) == ExitCode.OK
    return asked


def test_stop_waits_for_the_process(
    hub: Path, runs: list[RunStatus], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the `resume` that it names can be typed at once."""
    monkeypatch.setattr(operate, "LOOK_S", 0.0)
    assert stopped(hub, runs, monkeypatch) == ["stop", *["look"] * 4, "read"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "waiting for the process of run-0001 to end"
    assert said[1:] == [f"stopped run-0001; to go on: fedmedgan-coordinator resume {hub} run-0001"]


def test_stop_does_not_wait_for_ever(
    hub: Path, runs: list[RunStatus], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operate, "END_S", -1.0)
    assert stopped(hub, runs, monkeypatch) == ["stop", "look", "look", "read"]
    assert "its process has not ended yet. To go on when it has: " in capsys.readouterr().out


def test_stop_looks_at_what_became_of_the_run(
    hub: Path, runs: list[RunStatus], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(hub, runs, monkeypatch, outcome="failed", looks=0)
    assert capsys.readouterr().out.startswith("run-0001 failed before its first round: a reason. ")
    write_atomic(begun(hub, "run-0001") / "report.html", b"")  # a stop while the results are written waits for them
    stopped(hub, runs, monkeypatch, looks=0)
    assert capsys.readouterr().out == f"run-0001 was completed meanwhile: see {hub}/runs/run-0001/report.html\n"


def test_who_ends_the_following_hears_that_the_run_goes_on(
    hub: Path, runs: list[RunStatus], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing else: not that it was stopped."""

    def follow(*_: object) -> Iterator[str]:
        yield "waiting\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(control, "submit", lambda *_, **__: 8)
    monkeypatch.setattr(control, "follow", follow)
    runs.clear()
    assert exit_of("run", hub, hub.parent / "run.toml") == ExitCode.INTERRUPTED
    goes_on = f"the run goes on; to end it: fedmedgan-coordinator stop {hub} run-0001"
    assert capsys.readouterr().err.split("\n") == ["", goes_on, ""]


def test_a_run_that_needs_more_sites_than_are_enrolled_names_the_enrolled(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no key of the simulator: a deployment has none."""
    enrol(Consortium(hub), "st-john", revoked=True)
    with (hub.parent / "run.toml").open("a") as file:
        file.write("[federation]\nmin_sites = 2\n")
    assert exit_of("run", hub, hub.parent / "run.toml") == ExitCode.CONFIG
    said = capsys.readouterr().err
    assert "federation.min_sites of at most 1, got 2: 1 site is enrolled and not revoked (st-mary)" in said
    assert "simulation" not in said


def test_shared_noise_is_refused_between_machines_with_the_reason(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (hub.parent / "run.toml").open("a") as file:
        file.write('[privacy]\ncolluding_sites = 1\n[train]\nalgorithm = "secure-sum"\nsteps_per_round = 1\n')
    assert exit_of("run", hub, hub.parent / "run.toml") == ExitCode.CONFIG
    said = " ".join(capsys.readouterr().err.split())
    assert "privacy.colluding_sites = 'all' between machines, got 1" in said
    assert "nothing in this release masks the part of a single site" in said


def test_a_run_starts_from_a_generator_that_fits_it_or_not_at_all(
    hub: Path, runs: list[RunStatus], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.clear()
    monkeypatch.setattr(control, "submit", lambda *_, **__: 8)
    public, file = hub.parent / "public", hub.parent / "run.toml"
    made = build_config(read_config(file), {"federation.seed": 7})
    save_start(public, initial_pair(made).generator, made)
    assert exit_of("run", hub, file, "--start", public, "--detach") == ExitCode.OK
    started = read_start(RunFolder(hub / "runs" / "run-0001", ""), build_config(read_config(file), {}))
    assert started is not None
    wanted = initial_pair(made).generator.named_parameters()
    assert all(np.array_equal(started[f"generator.{name}"], weights.detach().numpy()) for name, weights in wanted)
    with file.open("a") as more:
        more.write("[model]\nlatent_dim = 3\n")
    assert exit_of("run", hub, file, "--start", public, "--detach") == ExitCode.CONFIG
    assert "with the widths of the run" in capsys.readouterr().err
    assert exit_of("run", hub, file, "--start", hub.parent / "none", "--detach") == ExitCode.RESUME
    with file.open("a") as more:
        more.write('[simulation]\nstart = "phantoms"\n')
    assert exit_of("run", hub, file, "--detach") == ExitCode.CONFIG
    assert "fedmedgan-simulate pretrain CONFIG --out FOLDER" in " ".join(capsys.readouterr().err.split())
    assert not (hub / "runs" / "run-0002").exists()


def test_who_follows_hears_that_the_process_is_gone_or_that_another_one_completed_the_run(
    hub: Path, runs: list[RunStatus], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(hub, "run-0001")
    left = RunStatus(8, "running", "", "", folder, "")  # so the link believes after a restart
    monkeypatch.setattr(control, "submit", lambda *_, **__: 8)
    monkeypatch.setattr(control, "follow", lambda *given: iter(["gone\n"] if given[2]() else ["at work\n"]))
    monkeypatch.setattr(control, "read_run", lambda *_: left)
    write_atomic(make_folder(Consortium(hub).running) / "8", b"")
    runs.clear()
    assert exit_of("resume", hub, "run-0001") == ExitCode.FEDERATION
    said = capsys.readouterr()
    assert said.out.endswith("gone\n")
    assert "run-0001 was interrupted before its first round: its process was killed. To go on: " in said.err
    monkeypatch.setattr(control, "follow", lambda *_: iter([(folder / "report.html").write_text("")]))
    assert exit_of("resume", hub, "run-0001") == ExitCode.OK
    assert f"run-0001 was completed meanwhile: see {folder}/report.html" in capsys.readouterr().out


def test_a_run_is_named_by_its_name_or_its_folder_from_the_home_or_from_here(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    consortium, folder = Consortium(hub), begun(hub, "run-0002")
    elsewhere = begun(hub.parent / "elsewhere", "run-0003")
    monkeypatch.chdir(hub.parent)
    for given in ("run-0002", "runs/run-0002", "hub/runs/run-0002", "./hub/runs/run-0002/", str(folder)):
        assert operate.folder_of(consortium, Path(given)) == folder, given
    assert operate.folder_of(consortium, Path("elsewhere/runs/run-0003")) == elsewhere
    assert operate.folder_of(consortium, Path("hub/../elsewhere/runs/run-0003")) == elsewhere
    begun(hub.parent, "run-0002")  # a folder of that name below here: the home's own is meant
    assert operate.folder_of(consortium, Path("runs/run-0002")) == folder
    for missing, path in (("run-0009", hub / "runs"), ("runs/run-0009", hub.parent / "runs")):
        assert exit_of("resume", "hub", missing) == ExitCode.RESUME
        assert f"{path / 'run-0009'} is no folder of a run. Name one as " in capsys.readouterr().err


def test_a_run_is_the_same_by_whatever_way_its_folder_is_reached(
    hub: Path, runs: list[RunStatus], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `..`, by a link to the home or by the disk that a run lies on: it is what the link lists by its own path."""
    folder, disk = begun(hub, "run-0001"), begun(hub.parent / "disk", "run-0002")
    linked = hub / "runs" / "run-0002"
    linked.symlink_to(disk)
    (hub.parent / "way").symlink_to(hub)
    monkeypatch.chdir(hub / "runs")
    for given in ("../runs/run-0001", "run-0001/../run-0001", str(hub.parent / "way" / "runs" / "run-0001")):
        assert operate.folder_of(Consortium(hub), Path(given)) == folder, given
    for given in ("run-0002", str(linked), str(disk), "../../disk/runs/run-0002"):
        assert operate.folder_of(Consortium(hub), Path(given)) == linked, given
    runs[0] = RunStatus(7, "running", "", "", folder, "")
    monkeypatch.setattr(control, "submit", lambda *_, **__: 8)
    write_atomic(make_folder(Consortium(hub).running) / "7", b"")
    assert exit_of("resume", hub, "../runs/run-0001", "--detach") == ExitCode.OK  # as by its name: its process is gone
    assert capsys.readouterr().out == f"run-0001 in {folder}\n"
