"""A coordinator as it is run: its commands, one real site behind Flower's own SuperNode, and things that go wrong."""

import hashlib
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psutil
import pytest
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.fab import Fab

from common.config_text import build_config, to_toml
from common.files import write_atomic
from server.consortium import Consortium, read_settings
from server.control import connect
from tests import tiny_site
from tests.coordinator_home import ROOT, end, enrol, environment, make_home, wait_until_up

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what Flower uses
]

BIN = Path(sys.executable).parent


DESCRIPTION = """
[project]
name = "fedmedgan"
version = "0.1.0"
description = "another"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedmedgan"

[tool.flwr.app.components]
serverapp = "evil:app"
clientapp = "evil:app"
"""


class Recorder:
    """A proxy that connects nobody and counts who asks."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.asked: list[bytes] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                self.asked.append(connection.recv(200))

    @property
    def variables(self) -> dict[str, str]:
        address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        return dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy"), address)


def command(consortium: Consortium, *arguments: str | Path, **options) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "server.cli", *map(str, arguments)]
    return subprocess.Popen(line, env=environment(consortium), cwd=ROOT, text=True, **options)


def ask(consortium: Consortium, *arguments: str | Path) -> tuple[int, str]:
    process = command(consortium, *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = process.communicate(timeout=90)
    return process.returncode, said


def processes_of(consortium: Consortium, word: str) -> list[psutil.Process]:
    folder = str(consortium.folder)
    return [p for p in psutil.process_iter(["cmdline"]) if {folder, word} <= set(p.info["cmdline"] or ())]


def wait_for(condition, timeout_s: float = 60.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder()
    for name, value in made.variables.items():
        monkeypatch.setenv(name, value)
    yield made
    made.listener.close()


@pytest.fixture
def coordinator(tmp_path: Path, recorder: Recorder) -> Iterator[Consortium]:
    consortium = make_home(tmp_path / "coordinator")
    process = command(consortium, "start", consortium.folder)
    try:
        wait_until_up(consortium)
        yield consortium
    finally:
        end(process, 60)
        left = processes_of(consortium, "--run") + processes_of(consortium, "--supervised")
        for one in left:
            one.kill()
        assert not left


def write_config(consortium: Consortium, **federation: float) -> Path:
    changes = {f"federation.{key}": value for key, value in federation.items()}
    changes |= {"performance.threads": 1, "warmup.share": 0.0}
    path = consortium.folder / "run.toml"
    write_atomic(path, to_toml(build_config(tiny_site.PROPOSAL.model_dump(), changes)).encode())
    return path


@pytest.mark.timeout(300)
def test_a_run_waits_is_stopped_and_the_bad_ones_do_not_start(coordinator: Consortium) -> None:
    config = write_config(coordinator, connect_timeout_s=100.0)
    assert ask(coordinator, "run", coordinator.folder, config)[0] == 3  # nobody is enrolled
    enrol(coordinator, "st-mary")
    code, said = ask(coordinator, "run", coordinator.folder, config, "--detach")
    assert code == 0, said
    assert said.startswith("run-0001 in ")
    wait_for(lambda: processes_of(coordinator, "--run"))
    assert ask(coordinator, "stop", coordinator.folder, "run-0002")[0] == 6
    code, said = ask(coordinator, "run", coordinator.folder, config, "--detach")
    assert (code, "run-0001 is under way with these sites" in said) == (8, True)
    assert f"fedmedgan-coordinator stop {coordinator.folder} run-0001" in said
    code, said = ask(coordinator, "stop", coordinator.folder)
    assert (code, "stopped run-0001" in said) == (0, True)
    assert not processes_of(coordinator, "--run")
    tree = json.loads(ask(coordinator, "status", coordinator.folder, "--json")[1])
    assert [one["state"] for one in tree["runs"]] == ["stopped"]
    _resume_twice(coordinator)


def _resume_twice(coordinator: Consortium) -> None:
    """One is taken, at once after the stop; the other is told."""
    resumes = [
        command(coordinator, "resume", coordinator.folder, "run-0001", "--detach", stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [resume.communicate(timeout=90)[1] for resume in resumes]
    assert sorted(resume.returncode for resume in resumes) == [0, 8], said
    assert "run-0001 is under way already" in "".join(said)
    assert ask(coordinator, "stop", coordinator.folder, "run-0001")[0] == 0


def test_a_killed_run_ends(coordinator: Consortium) -> None:
    """Who follows hears of it at once, not after the minute without a heartbeat; so does who asks."""
    enrol(coordinator, "st-mary")
    config = write_config(coordinator, connect_timeout_s=600.0)
    out = coordinator.folder / "out.log"
    with out.open("w") as log:
        following = command(coordinator, "run", coordinator.folder, config, stdout=log, stderr=log)
    wait_for(lambda: "waiting for st-mary" in out.read_text())
    assert "waiting for st-mary" in ask(coordinator, "status", coordinator.folder)[1]
    (run,) = processes_of(coordinator, "--run")
    run.kill()
    assert following.wait(90) == 8
    again = f"To go on: fedmedgan-coordinator resume {coordinator.folder} run-0001"
    assert f"run-0001 was interrupted before its first round: its process was killed. {again}" in out.read_text()
    code, said = ask(coordinator, "resume", coordinator.folder, "run-0001", "--detach")
    assert code == 0, said
    wait_for(lambda: processes_of(coordinator, "--run"))
    (one,) = json.loads(ask(coordinator, "status", coordinator.folder, "--json")[1])["runs"]
    assert (one["run"], one["state"]) in (("run-0001", "starting"), ("run-0001", "running"))


@pytest.mark.timeout(300)
def test_a_run_killed_with_the_coordinator_ends_for_who_follows_it(tmp_path: Path) -> None:
    """As soon as the coordinator is back; its link would believe for minutes that the run goes on, here for long."""
    consortium = make_home(tmp_path / "coordinator")
    enrol(consortium, "st-mary")
    out = consortium.folder / "out.log"
    with ExitStack() as stack:
        stack.callback(end, command(consortium, "start", consortium.folder), 60)
        wait_until_up(consortium)
        with out.open("w") as log:
            config = write_config(consortium, connect_timeout_s=600.0)
            following = command(consortium, "run", consortium.folder, config, stdout=log, stderr=log)
        stack.callback(end, following, 60)
        wait_for(lambda: "waiting for st-mary" in out.read_text())
        killed = [*processes_of(consortium, "server.supervise"), *processes_of(consortium, "--supervised")]
        killed += processes_of(consortium, "--run")
        for one in killed:
            one.kill()
        psutil.wait_procs(killed, 20)
        with closing(sqlite3.connect(consortium.database)) as database, database:
            database.execute("UPDATE task SET active_until = datetime(active_until, '+900 seconds')")
        stack.callback(end, command(consortium, "start", consortium.folder), 60)
        assert following.wait(200) == 8, out.read_text()
        assert "run-0001 was interrupted before its first round: its process was killed." in out.read_text()


def test_a_bundle_of_other_code_is_not_started(coordinator: Consortium, tmp_path: Path) -> None:
    """Whoever has the token of the control API still cannot run code of his own on this machine."""
    enrol(coordinator, "st-mary")
    canary = tmp_path / "canary"
    files = {
        "pyproject.toml": DESCRIPTION.encode(),
        "evil.py": f"from pathlib import Path\nPath({str(canary)!r}).touch()\napp = None\n".encode(),
    }
    bundle = build_fab_from_files(files)[0]
    with connect(coordinator) as control:
        fab = fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
        assert control.StartRun(StartRunRequest(fab=fab, federation="")).run_id
    wait_for(lambda: "of another release" in (coordinator.logs / "executor.log").read_text())
    time.sleep(1)
    assert not processes_of(coordinator, "--run")
    assert not canary.exists()


def test_commands_without_a_coordinator_say_what_to_do(tmp_path: Path) -> None:
    consortium = make_home(tmp_path / "coordinator")
    enrol(consortium, "st-mary")
    code, said = ask(consortium, "status", consortium.folder)
    assert (code, "fedmedgan-coordinator start" in said) == (8, True)
    consortium.control_token.chmod(0o644)
    code, said = ask(consortium, "status", consortium.folder)
    assert (code, "chmod 600" in said) == (7, True)
    with socket.create_server(("127.0.0.1", read_settings(consortium).port)):
        consortium.control_token.chmod(0o600)
        code, said = ask(consortium, "start", consortium.folder)
        assert (code, "change the port" in said) == (3, True)
