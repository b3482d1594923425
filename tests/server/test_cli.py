"""The coordinator's listings."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn, get_args

import pytest

from common.config import IMAGE_SIZES, ModelName
from common.config_text import build_config
from common.errors import ExitCode, FederationError
from common.files import make_folder, write_atomic
from common.lock import alone
from server import control
from server.cli import main
from server.control import RunStatus
from server.handshake import all_refuse, few_remain
from server.rounds import round_bytes
from server.status import under_way
from tests.coordinator_home import enrol, make_home


def test_models_lists_what_a_round_sends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["models"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert [(row[0], int(row[1])) for row in rows] == [
        (name, size) for name in get_args(ModelName) for size in IMAGE_SIZES
    ]
    together = {"train.algorithm": "secure-sum", "train.steps_per_round": 1}
    for name, size, *_, local, halved, sum_of_all in rows:
        changes = {"model.name": name, "image.size": int(size), "image.classes": ("a", "b")}
        assert int(local.replace(",", "")) == round_bytes(build_config({}, changes))
        half = build_config({}, changes | {"federation.transport": "float16"})
        assert int(halved.replace(",", "")) == round_bytes(half) == int(local.replace(",", "")) / 2
        assert int(sum_of_all.replace(",", "")) == round_bytes(build_config({}, changes | together))


def test_resume_says_where_there_is_nothing_to_go_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def resumed(folder: Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["resume", str(tmp_path / "hub"), str(folder)])
        assert stopped.value.code == ExitCode.RESUME
        return capsys.readouterr().err

    assert "is no folder of a run" in resumed(tmp_path)
    (tmp_path / "config.toml").touch()
    with alone(tmp_path / "run.lock", "run"):
        assert "is at work" in resumed(tmp_path)
    (tmp_path / "report.html").touch()
    assert "is complete" in resumed(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a home with one site and a link that says that run-0001 is under way."""
    consortium = make_home(tmp_path / "hub")
    enrol(consortium, "st-mary")
    runs = [RunStatus(7, "running", "", "", consortium.runs / "run-0001", "2026-11-27T07:00:00+00:00")]
    monkeypatch.setattr(control, "connect", lambda _: nullcontext())
    monkeypatch.setattr(control, "list_runs", lambda *_: runs)
    (tmp_path / "run.toml").write_text('[image]\nclasses = ["a"]\n')
    return consortium.folder


def exit_of(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


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


@pytest.mark.parametrize("command", [("generate", "--out", "images"), ("report",)])
def test_results_are_of_a_finished_run_of_the_home(
    hub: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = command
    assert exit_of(name, hub, "run-0009", *options) == ExitCode.RESUME
    assert "is no folder of a run" in capsys.readouterr().err
    write_atomic(make_folder(hub / "runs" / "run-0002") / "config.toml", b"")
    assert exit_of(name, hub, "run-0002", *options) == ExitCode.RESUME
    assert f"is not finished: fedmedgan-coordinator resume {hub} run-0002" in capsys.readouterr().err


@pytest.mark.parametrize("held", [True, False])
def test_of_a_run_at_work_nobody_is_told_to_resume_it(
    hub: Path, held: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_atomic(make_folder(hub / "runs" / "run-0001") / "config.toml", b"")  # the link says that it is under way

    def away(_: object) -> NoReturn:
        raise FederationError("The coordinator does not answer")

    if held:
        monkeypatch.setattr(control, "connect", away)
    with alone(hub / "runs" / "run-0001" / "run.lock", "run") if held else nullcontext():
        assert exit_of("report", hub, "run-0001") == ExitCode.RESUME
    said = capsys.readouterr().err
    assert f"is at work. Wait for its end (fedmedgan-coordinator status {hub})" in said
    assert f"stop {hub} run-0001" in said
    assert "resume" not in said


@pytest.mark.parametrize(
    ("outcome", "details", "told", "resumed"),
    [
        ("stopped", "", "run-0001 was stopped before its first round. To go on:", True),
        ("failed", control.KILLED, "run-0001 was interrupted before its first round", True),
        ("failed", str(all_refuse({"a": "policy"})), "Every site refuses this run for good (a: policy)", False),
        ("failed", str(few_remain({"a": "policy"}, 1, 2)), "Too few sites are left for this run", False),
    ],
)
def test_a_run_without_results_says_how_it_ended(
    hub: Path,
    outcome: str,
    details: str,
    told: str,
    resumed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_folder(hub / "runs" / "run-0001")
    write_atomic(folder / "config.toml", b"")
    details = f"ServerApp failed with exception: {details}" if "for" in details else details
    ended = RunStatus(7, "finished", outcome, details, folder, "2026-11-27T07:00:00+00:00")
    monkeypatch.setattr(control, "list_runs", lambda *_: [ended])
    assert exit_of("generate", hub, "run-0001", "--out", "images") == ExitCode.RESUME
    said = capsys.readouterr().err
    assert told in said
    assert (f"resume {hub} run-0001" in said) == resumed


def test_a_report_is_written_anew_by_home_and_name(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, written = make_folder(hub / "runs" / "run-0002"), list[Path]()
    for file in ("config.toml", "privacy.json"):
        write_atomic(folder / file, b"")
    monkeypatch.setattr("server.report.write_report", written.append)
    assert exit_of("report", hub, "run-0002") == ExitCode.OK
    assert exit_of("report", hub, folder) == ExitCode.OK
    assert written == [folder, folder]


def test_a_coordinator_that_is_down_shows_what_the_files_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consortium = make_home(tmp_path / "hub")  # never started
    enrol(consortium, "st-mary")
    enrol(consortium, "st-john", revoked=True)
    for name, files in (("run-0001", ("report.html",)), ("run-0002", ())):
        for file in ("config.toml", *files):
            write_atomic(make_folder(consortium.runs / name) / file, b"")
    assert exit_of("status", consortium.folder) == ExitCode.FEDERATION
    said = capsys.readouterr()
    assert "does not answer" in said.err
    rows = [line.split()[:3] for line in said.out.splitlines() if line.startswith(("run-", "st-"))]
    assert rows[:2] == [["st-mary", "unknown", "unknown"], ["st-john", "revoked", "-"]]  # only the link knows
    assert [row[:2] for row in rows[2:]] == [["run-0002", "unfinished"], ["run-0001", "completed"]]
    assert exit_of("status", consortium.folder, "--json") == ExitCode.FEDERATION
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert [(site["online"], site["last_seen"]) for site in sites] == [(None, None), (False, "")]
