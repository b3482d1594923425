"""A hostile coordinator against real agents: `fedmedgan-site serve` on a real home, asked over its socket.

The list of what it sends stands in tests/hostile_requests. In the end `fedmedgan-site` verifies ledger and journal.
"""

import dataclasses
import fcntl
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from client.channel import connect, pack_request, read_frame, unpack_reply
from client.home import Home
from common.crypto import SigningKey, save_key
from common.errors import RefusalCode
from common.files import make_folder
from common.greeting import hello_settings
from common.messages import Kind, Reply, Request, Seal
from common.seal import seal_request
from tests.e2e.conftest import ENVIRONMENT
from tests.hostile_requests import D_STEPS, FRAMES, RUN_IDS, TRAIN, WARMUP
from tests.pinned import COORDINATOR, pin
from tests.tiny_site import make_home, train_request, warmup_request

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
HELLO = Request(Kind.HELLO, "run-1", 0, "", hello_settings())
NOTHING_MORE = {RefusalCode.POLICY, RefusalCode.BAD_REQUEST, RefusalCode.NO_DATA}
IDENTITY = SigningKey.generate()
SITE = [sys.executable, "-m", "client.cli"]
WORLD = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    made = make_folder(folder / "home" / "keys", 0o700)
    made.parent.chmod(0o700)
    save_key(Home(folder / "home").key, IDENTITY)
    home = make_home(folder)
    pin(home)  # what is hostile below is the pinned coordinator itself
    return home.folder


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Home:
    shutil.copytree(template, tmp_path / "home")
    return Home(tmp_path / "home")


@contextmanager
def agents(home: Home, count: int = 1) -> Generator[list[Path]]:
    """Start agents on one home, each on a socket of its own, and end them as a service manager does."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # short: a socket's path holds 107 bytes
        paths = [folder / f"{number}.sock" for number in range(count)]
        commands = [[*SITE, "serve", str(home.folder), "--socket", str(path)] for path in paths]
        running = [stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=WORLD)) for command in commands]
        try:
            for path, process in zip(paths, running, strict=True):
                while not is_up(path):
                    assert process.poll() is None
                    time.sleep(0.1)
            yield paths
            assert [process.poll() for process in running] == [None] * count  # nothing ended an agent
        finally:
            for process in running:
                process.terminate()
                process.wait(30)


def is_up(path: Path) -> bool:
    try:
        return connect(path, 30.0)(signed(HELLO)).refusal is None
    except OSError:
        return False


def signed(request: Request) -> Request:
    return seal_request(COORDINATOR, request, time.time() + 600, IDENTITY.verify_key)


def pack(request: Request) -> bytes:
    try:
        return pack_request(signed(request))
    except UnicodeEncodeError:  # half a character cannot be signed; it is sent with a signature of nothing
        return pack_request(dataclasses.replace(request, seal=Seal("00" * 16, int(time.time()) + 600, "00" * 64)))


def send(path: Path, content: bytes) -> bytes:
    """Send bytes as they are and read a whole reply frame."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(60.0)
        connection.connect(str(path))
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the agent has seen enough; its answer is there to be read
        return read_frame(connection, 60.0)


def verified(home: Home) -> tuple[float, int]:
    """Let the officer's commands verify ledger and journal; return the epsilon spent and the number of releases."""
    said = [
        subprocess.run([*SITE, *command, str(home.folder)], cwd=ROOT, env=WORLD, capture_output=True, text=True)
        for command in (["ledger"], ["journal", "verify"])
    ]
    assert [done.returncode for done in said] == [0, 0], [done.stderr for done in said]
    spent, releases = (done.stdout.strip().splitlines()[-1] for done in said)
    return float(spent.split()[2]), int(releases.split()[1])


def test_every_hostile_request_gets_a_code_and_costs_nothing(home: Home) -> None:
    requests = [change(train_request()) for change in TRAIN.values()]
    requests += [change(warmup_request()) for change in WARMUP.values()]
    requests += [make(run_id=run_id) for run_id in RUN_IDS for make in (train_request, warmup_request)]
    requests += [
        dataclasses.replace(train_request(), settings={"d_steps_per_g_step": value})  # pyright: ignore[reportArgumentType]
        for value in D_STEPS
    ]
    with agents(home) as (path,):
        for request in requests:
            reply = dataclasses.replace(unpack_reply(send(path, pack(request))), signature="")
            assert reply.refusal in NOTHING_MORE
            assert reply in (
                Reply(request.kind, request.run_id, request.round, reply.refusal),
                Reply(Kind.HELLO, "", 0, RefusalCode.BAD_REQUEST),  # it did not decode
            )
        for name, frame in FRAMES.items():
            assert unpack_reply(send(path, frame)) == Reply(Kind.HELLO, "", 0, RefusalCode.BAD_REQUEST), name
        assert verified(home) == (0.0, 0)
        assert list(home.replies.iterdir()) == []
        assert connect(path, 30.0)(signed(warmup_request())).refusal is None  # and it still works


def test_a_peer_that_leaves_in_mid_reply_gets_the_same_bytes_again(home: Home) -> None:
    frame = pack(train_request())
    with agents(home) as (path,):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            connection.sendall(frame)
            begun = connection.recv(100)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        first, again = send(path, frame), send(path, frame)
    assert first == again
    assert first.startswith(begun)
    assert verified(home)[1] == 1


def test_two_agents_race_for_the_last_of_the_budget(home: Home) -> None:
    """Two real agents, four runs, all at once, and one request that both get: never over budget, never two answers."""
    same: list[bytes] = []
    replies: list[Reply] = []
    both = pack(train_request(run_id="both"))
    with agents(home, count=2) as paths:

        def run(path: Path, name: str) -> None:
            same.append(send(path, both))
            for request in (warmup_request(name), *(train_request(number, name) for number in (1, 2, 3))):
                replies.append(unpack_reply(send(path, pack(request))))

        runs = [threading.Thread(target=run, args=(paths[number % 2], f"run-{number}")) for number in range(4)]
        for thread in runs:
            thread.start()
        for thread in runs:
            thread.join()
    assert len(replies) == 16
    assert len(set(same)) == 1
    granted = [reply for reply in [*replies, unpack_reply(same[0])] if reply.refusal is None]
    assert {reply.refusal for reply in replies} == {None, RefusalCode.OVER_BUDGET}
    spent, releases = verified(home)
    assert releases == len(granted)
    assert spent == pytest.approx(max(float(reply.fields["epsilon_spent"]) for reply in granted), abs=1e-3)
    assert spent <= 8.0


def is_held(home: Home) -> bool:
    with (home.folder / "agent.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_an_agent_that_dies_with_the_lock_lets_the_other_go_on(home: Home) -> None:
    with agents(home) as (path,), tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "s"
        for number in (1, 2):
            process = subprocess.Popen([*SITE, "serve", str(home.folder), "--socket", str(other)], cwd=ROOT, env=WORLD)
            while not is_up(other):
                assert process.poll() is None
                time.sleep(0.1)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(str(other))
                connection.sendall(pack(train_request(number)))
                while not is_held(home):
                    time.sleep(0.001)
                time.sleep(0.3 * (number - 1))
                process.kill()
                process.wait()
            assert connect(path, 60.0)(signed(train_request(number))).refusal is None
        assert verified(home)[1] == 2


def test_nothing_of_the_site_stands_in_a_refusal(home: Home) -> None:
    """Not its name, its patients, its paths, its text; the reasons stand in its own log, one line each."""
    loud = dataclasses.replace(
        train_request(), arrays={name: np.full_like(a, 3.4e38) for name, a in train_request().arrays.items()}
    )
    bad = TRAIN["model: a class that clears the screen"](train_request())
    with agents(home) as (path,):
        frames = [send(path, pack(bad)), send(path, pack(TRAIN["privacy: another delta"](loud)))]
    for frame in frames:
        header = re.sub(rb'"signature": "[0-9a-f]+"', b"", frame[20:-8].rstrip(b"{} "))
        for word in (b"st-mary", b"p1", str(home.folder).encode(), b"Expected", b"delta", b"patients", b"clear", b"40"):
            assert word not in header
    lines = [line for line in home.log.read_text().splitlines() if "refused" in line]
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
