"""The supervisor with children of a few lines: started anew, ended with it, and given up where a person must mend."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from client import supervise as supervising
from client.supervise import Child, supervise
from common.errors import ExitCode, StorageError
from common.lock import alone, is_held
from common.passphrase import Passphrase

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SLEEP = "import time; time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


def child(code: str, name: str = "agent") -> Child:
    return Child(name, [sys.executable, "-c", code])


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Supervised:
    def __init__(self, state: Path, *children: Child) -> None:
        self.stop, self.codes, self.state, self.children = threading.Event(), [], state, children
        self.thread = threading.Thread(target=lambda: self.codes.append(supervise(children, state, self.stop)))

    def __enter__(self) -> "Supervised":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(30)
        assert not self.thread.is_alive()
        assert not [child for child in self.children if child.process is not None]

    def pid(self, name: str) -> int | None:
        return json.loads(self.state.read_text())[name]["pid"] if self.state.exists() else None


def test_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "FIRST_WAIT_S", 0.1)
    one = child(SLEEP)
    one.wait_s = 0.1
    with Supervised(tmp_path / "state.json", one) as running:
        wait_for(lambda: running.pid("agent"))
        first = running.pid("agent")
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: running.pid("agent") not in (None, first))
        assert one.starts == 2
    assert running.codes == [ExitCode.OK]
    assert running.pid("agent") is None


def test_a_child_is_told_that_it_is_started_again(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    code = f"import sys; open({str(seen)!r}, 'a').write(' '.join(sys.argv[1:]) + ';')"
    one = Child("relay", [sys.executable, "-c", code], again=("--again",))
    one.wait_s = 0.05
    with Supervised(tmp_path / "state.json", one):
        wait_for(lambda: seen.exists() and seen.read_text().count(";") > 1)
    assert seen.read_text().startswith(";--again;")


def test_waits_grow_to_their_bound_and_a_steady_child_begins_anew(tmp_path: Path) -> None:
    one, waits = child("pass"), []
    for _ in range(7):
        one.due = 0.0
        assert supervising._look_after(one)
        one.process.wait()
        waits.append(one.wait_s)
        assert supervising._look_after(one)
    assert waits == [1, 2, 4, 8, 15, 15, 15]
    one.due = 0.0
    supervising._look_after(one)
    one.process.wait()
    one.started -= supervising.STEADY_S + 1
    supervising._look_after(one)
    assert one.due - time.monotonic() < 1.1


CODES = [ExitCode.STORAGE, ExitCode.CONFIG, ExitCode.WIRE, ExitCode.PASSPHRASE, ExitCode.ENROLMENT]


@pytest.mark.parametrize("code", CODES)
def test_a_code_for_a_person_ends_everything(tmp_path: Path, code: ExitCode) -> None:
    other = child(SLEEP, "relay")
    assert supervise([child(f"raise SystemExit({int(code)})"), other], tmp_path / "s.json", threading.Event()) == code
    assert other.process is None


@pytest.mark.parametrize("code", [0, ExitCode.INTERNAL, ExitCode.FEDERATION, ExitCode.INTERRUPTED])
def test_other_codes_do_not(code: int) -> None:
    assert code not in supervising.FOR_A_PERSON


def test_leaves_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor a child that does not hear SIGTERM."""
    monkeypatch.setattr(supervising, "GRACE_S", 0.5)
    with Supervised(tmp_path / "state.json", child(DEAF), child(SLEEP, "relay")) as running:
        heard: list[str] = []
        wait_for(lambda: heard.append(capfd.readouterr().out) or "deaf" in "".join(heard))
        wait_for(lambda: running.pid("agent") and running.pid("relay"))
        pids = [running.pid("agent"), running.pid("relay")]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


READER = """
import json, os, sys, pathlib
number = int(sys.argv[sys.argv.index("--passphrase-fd") + 1])
shown = sys.argv[1:] + list(os.environ.values())
out = pathlib.Path(sys.argv[1])
out.write_text(json.dumps([os.read(number, 100).decode(), os.read(number, 100).decode(), shown]))
"""


def test_a_passphrase_goes_through_a_pipe_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each start, whole and once; not in the arguments, not in the environment, not in the state."""
    monkeypatch.setattr(supervising, "FIRST_WAIT_S", 0.1)
    secret, out = "correct horse battery staple", tmp_path / "out.json"
    agent = Child("agent", [sys.executable, "-c", READER, str(out)], Passphrase(secret))
    relay = child(SLEEP, "relay")
    assert secret not in repr(agent)
    for _ in range(2):
        with Supervised(tmp_path / "state.json", agent, relay):
            wait_for(lambda: out.exists() and out.read_text())
        first, then, shown = json.loads(out.read_text())
        assert (first, then) == (secret, "")
        assert secret not in " ".join(shown)
        out.unlink()
    assert secret not in (tmp_path / "state.json").read_text()


def test_disk_may_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "FIRST_WAIT_S", 0.1)

    def full(*_: object) -> None:
        raise StorageError("No space left on device")

    monkeypatch.setattr(supervising, "write_atomic", full)
    one = child(SLEEP)
    one.wait_s = 0.1
    with Supervised(tmp_path / "state.json", one) as running:
        wait_for(lambda: one.process)
        os.kill(one.process.pid, signal.SIGKILL)
        wait_for(lambda: one.starts == 2)
    assert running.codes == [ExitCode.OK]


def test_a_tethered_child_ends_with_its_supervisor(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ndef main(arguments):\n    time.sleep(60)\n")
    command = [sys.executable, "-P", "-m", "client.tether", "sleeper"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    tethered = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    with pytest.raises(subprocess.TimeoutExpired):
        tethered.wait(1)
    tethered.stdin.close()
    assert tethered.wait(10) == -signal.SIGTERM


def test_one_of_a_kind_a_home(tmp_path: Path) -> None:
    lock = tmp_path / "logs" / "start.lock"
    assert not is_held(lock)
    with alone(lock, "`start`"):
        assert is_held(lock)
        with pytest.raises(StorageError, match="is at work there already"), alone(lock, "`start`"):
            pass
    assert not is_held(lock)


def test_one_that_ends_is_waited_for(tmp_path: Path) -> None:
    """A `start` that was killed leaves children that take a moment; the next one's must not give up over them."""
    lock = tmp_path / "relay.lock"
    held = alone(lock, "relay")
    held.__enter__()
    threading.Timer(0.5, held.__exit__, (None, None, None)).start()
    with alone(lock, "relay", 20.0):
        assert is_held(lock)
