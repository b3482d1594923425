"""The checks of the machine, with numbers by argument."""

import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.agent import open_site
from client.doctor import machine
from client.doctor.findings import Finding, Status, look
from client.home import Home
from client.serve import serve
from common.errors import ExitCode
from tests.tiny_site import POLICY

GIB = 1 << 30


def test_disk() -> None:
    assert machine.check_disk(10 * GIB).status is Status.PASS
    assert machine.check_disk(GIB).status is Status.WARN
    assert machine.check_disk(1000).exit_code is ExitCode.STORAGE


def test_memory_grows_with_models_and_images() -> None:
    small = POLICY.model_copy(update={"allowed_models": ("mlp",), "allowed_image_sizes": (28,)})
    assert GIB < machine.needed_bytes(small, 0) < machine.needed_bytes(POLICY, 0) < machine.needed_bytes(POLICY, GIB)
    assert machine.check_memory(2 * GIB, GIB).status is Status.PASS
    assert machine.check_memory(GIB, 2 * GIB).status is Status.WARN
    assert machine.check_memory(None, GIB).status is Status.WARN


def test_available_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    assert machine.available_bytes(tmp_path) is None
    for name, text in (
        ("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:   2048 kB\n"),
        ("sys/fs/cgroup/memory.max", "max"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("100")
    assert machine.available_bytes(tmp_path) == 2048 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1100")
    assert machine.available_bytes(tmp_path) == 1000


def test_gpu_and_driver() -> None:
    assert machine.check_gpu("13.0", ["NVIDIA H100"]).status is Status.PASS
    without_driver, without_cuda = machine.check_gpu("13.0", []), machine.check_gpu(None, [])
    assert (without_driver.status, without_cuda.status) == (Status.WARN, Status.WARN)
    assert "driver" in without_driver.fix
    assert "driver" not in without_cuda.fix


def test_flower() -> None:
    assert machine.installed_flower() == machine.wanted_flower()
    assert machine.check_flower("1.41.0", "1.41.0").status is Status.PASS
    assert machine.check_flower("1.40.0", "1.41.0").exit_code is ExitCode.CONFIG
    assert machine.check_flower(None, "1.41.0").exit_code is ExitCode.MISSING_EXTRA
    assert machine.check_flower("1.41.0", None).status is Status.WARN


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path holds 107 bytes
        yield Path(folder) / "agent.sock"


def check(path: Path) -> Finding:
    return look("socket", lambda: machine.check_socket(path, 0.2))


@contextmanager
def listening(path: Path, answer: bytes | None = None) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o660)
        listener.listen()

        def speak() -> None:
            connection, _ = listener.accept()
            connection.sendall(answer or b"")
            connection.close()

        if answer is not None:
            threading.Thread(target=speak, daemon=True).start()
        yield


def test_socket_by_path_and_kind(path: Path) -> None:
    assert check(Path("/" + "s" * 107)).exit_code is ExitCode.CONFIG
    assert check(path).status is Status.WARN
    with listening(path):
        assert "does not answer" in check(path).said
        path.chmod(0o666)
        assert check(path).exit_code is ExitCode.STORAGE
        path.chmod(0o660)
    assert "left it behind" in check(path).said
    path.unlink()
    with listening(path, b"hello, hello, hello, hello"):
        assert check(path).exit_code is ExitCode.WIRE
    path.unlink()
    path.write_text("")
    assert check(path).exit_code is ExitCode.STORAGE


def test_an_agent_answers_and_nothing_is_written(tiny_home: Home, path: Path) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(open_site(tiny_home), path, stop))
    before = {book: book.stat().st_mtime_ns for book in (tiny_home.ledger, tiny_home.journal)}
    thread.start()
    try:
        while not path.exists():
            pass
        assert look("socket", lambda: machine.check_socket(path, 5)).status is Status.PASS
    finally:
        stop.set()
        thread.join()
    assert {book: book.stat().st_mtime_ns for book in before} == before
