"""`start`, `relay` and `status`: what they refuse and say, and that they hold no torch."""

import json
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client import cli, operate
from client.logs import log_to
from client.paths import Home
from client.relay_state import MAX_STATE_BYTES, STOPPED, State
from common.errors import ExitCode, FederationError
from common.lock import alone
from tests.pinned import pin

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def joined(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.relay_state.parent.mkdir(parents=True)
    pin(home)
    return home


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        operate.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def contact(home: Home, seconds_ago: float) -> None:
    time = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat()
    home.relay_state.write_text(json.dumps({"contact": time, "node": 5, "messages": 3, "started": time}))


def test_status_of_a_site_that_has_not_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status", tmp_path) == ExitCode.ENROLMENT
    assert "join" in capsys.readouterr().err


def test_status_tells_connected_from_not(joined: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status", joined.folder) == ExitCode.FEDERATION
    said = capsys.readouterr().out
    assert "st-mary of test; coordinator 127.0.0.1:9092" in said
    assert "start: not running" in said
    assert "never connected" in said
    contact(joined, 5)
    with alone(joined.relay_lock, "relay"):
        assert run("status", joined.folder) == ExitCode.OK
        assert "link: connected" in capsys.readouterr().out
        contact(joined, 300)
        assert run("status", joined.folder) == ExitCode.FEDERATION
        assert "NOT connected: no contact" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["relay.json", "start.json"])
@pytest.mark.parametrize("text", ["{]", "[" * 20_000, '{"contact": "' + "x" * MAX_STATE_BYTES + '"}', "\udcff"])
def test_status_names_a_file_that_is_damaged(
    joined: Home, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = joined.relay_state.with_name(name)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert run("status", joined.folder) == ExitCode.STORAGE
    assert f"Could not read {path}" in capsys.readouterr().err


def test_status_does_not_wait_to_say_what_the_relay_knows(joined: Home, capsys: pytest.CaptureFixture[str]) -> None:
    """The last contact is seconds old: the relay ended, was killed, or was refused since."""
    contact(joined, 1)
    assert run("status", joined.folder) == ExitCode.FEDERATION
    assert "NOT connected: no relay runs" in capsys.readouterr().out
    State(joined.relay_state).end("The link does not let this site in")
    for held in (nullcontext(), alone(joined.relay_lock, "relay")):
        with held:
            assert run("status", joined.folder) == ExitCode.FEDERATION
            assert "NOT connected: The link does not let this site in" in capsys.readouterr().out
    State(joined.relay_state).end(STOPPED)
    with alone(joined.relay_lock, "relay"):  # started again, and not yet connected
        assert run("status", joined.folder) == ExitCode.FEDERATION
        assert "NOT connected: no contact" in capsys.readouterr().out


def test_status_says_which_bundles(joined: Home, capsys: pytest.CaptureFixture[str]) -> None:
    run("status", joined.folder)
    assert "any" in capsys.readouterr().out
    joined.bundles.write_text("")
    run("status", joined.folder)
    assert "only those" in capsys.readouterr().out


def test_start_needs_a_home(joined: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("start", joined.folder) == ExitCode.STORAGE
    assert "init" in capsys.readouterr().err


def test_a_socket_with_a_long_path_is_refused(joined: Home, capsys: pytest.CaptureFixture[str]) -> None:
    joined.policy.write_text("")
    assert run("start", joined.folder, "--socket", "/" + "s" * 107) == ExitCode.CONFIG
    assert "107" in capsys.readouterr().err


def test_a_relay_that_is_started_again_tells_the_same_refusal_once(
    joined: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it was connected in between: then the same words tell a new end."""
    refusals = ["revoked", "revoked", "revoked", "out of date", "out of date", "out of date", "out of date"]
    nodes = [0, 0, 0, 0, 0, 7, 0]

    def refused(home: Home, socket: Path, state: State) -> None:
        del socket
        assert state.path == home.relay_state
        why, state.node_id = refusals.pop(0), nodes.pop(0)
        state.end(why)
        raise FederationError(why)

    monkeypatch.setattr("client.relay.run", refused)
    monkeypatch.setattr("client.operate.log_to", lambda _: None)
    monkeypatch.setattr("client.operate.flower_environment", lambda *_, **__: {})
    said: list[str] = []
    for again in ((), ("--again",), ("--again",), ("--again",), (), ("--again",), ("--again",)):
        assert run("relay", joined.folder, *again) == ExitCode.FEDERATION
        said.append(capsys.readouterr().err)
    revoked, out_of_date = "error: revoked\n", "error: out of date\n"
    assert said == [revoked, "", "", out_of_date, out_of_date, out_of_date, ""]


def test_all_commands_stand_in_one_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert all(f" {name} " in said for name in ("init", "serve", "start", "relay", "status"))


@pytest.mark.slow
def test_check_and_import_hold_no_torch() -> None:
    code = "import sys, client.bring; print(sorted({'torch', 'opacus', 'flwr'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run_ = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run_.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["client.relay", "client.operate", "client.entry"])
def test_relay_and_start_hold_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'pydicom', 'opacus', 'client.agent'}} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run_ = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run_.stdout.strip() == "[]"


def test_a_log_is_rotated_and_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    monkeypatch.setattr("client.logs.MAX_BYTES", 1000)
    for handler in before:
        root.removeHandler(handler)
    try:
        log_to(tmp_path / "logs" / "a.log")
        for _ in range(100):
            logging.getLogger("fedmedgan.relay").info("x" * 90)
        files = sorted(path.name for path in (tmp_path / "logs").iterdir())
        assert files == ["a.log", "a.log.1", "a.log.2", "a.log.3", "a.log.4"]
        assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "logs").iterdir())
    finally:
        for handler in list(root.handlers):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        for handler in before:
            root.addHandler(handler)
