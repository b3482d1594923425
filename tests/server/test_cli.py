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
from tests.coordinator_home import enrol, exit_of, make_home


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


def test_a_home_that_is_not_there_and_a_site_that_nobody_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first has one exit code here and at a site."""
    of_a_run = [("report", "run-0001"), ("generate", "run-0001", "--out", "images"), ("resume", "run-0001")]
    for command, *rest in (*zip(("status", "sites", "start", "stop")), *of_a_run):
        assert exit_of(command, tmp_path / "nowhere", *rest) == ExitCode.STORAGE
        assert "No coordinator's home stands in" in capsys.readouterr().err
    consortium = make_home(tmp_path / "hub")
    enrol(consortium, "st-mary")
    assert exit_of("revoke", consortium.folder, "st-marry") == ExitCode.ENROLMENT
    assert "Enrolled: st-mary" in capsys.readouterr().err


A_HOST = "expected a DNS name (in ASCII, xn--... where it has other letters) or an IP address"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--host", "a b"),
            "host: expected a DNS name (in ASCII, xn--... where it has other letters) or an IP address",
        ),
        (("--host", "h", "--port", 8444), "port and control_port are both 8444: the control API has a port of its own"),
        (("--host", "h", "--port", 0), "port: should be greater than or equal to 1"),
    ],
)
def test_wrong_flags_of_init_are_told_in_plain_words(
    flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of("init", tmp_path / "hub", *map(str, flags)) == ExitCode.CONFIG
    assert capsys.readouterr().err == f"error: Expected other values: {said}. Mend the flags.\n"
