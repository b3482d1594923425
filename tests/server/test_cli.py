"""The coordinator's listings."""

from pathlib import Path
from typing import get_args

import pytest

from common.config import IMAGE_SIZES, ModelName
from common.config_text import build_config
from common.errors import ExitCode
from common.files import make_folder, write_atomic
from server.cli import main
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
    rows = [line.split()[:2] for line in said.out.splitlines() if line.startswith(("run-", "st-"))]
    assert rows == [["st-mary", "no"], ["st-john", "revoked"], ["run-0002", "unfinished"], ["run-0001", "completed"]]


def test_a_home_that_is_not_there_and_a_site_that_nobody_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first has one exit code here and at a site."""
    for command in ("status", "sites", "start", "stop"):
        assert exit_of(command, tmp_path / "nowhere") == ExitCode.STORAGE
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
