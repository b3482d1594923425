"""The supervisor's logs, and its end."""

import time

import psutil
import pytest

from common.errors import ExitCode
from server.consortium import read_settings
from server.supervise import MAX_LOG_BYTES, rotate
from tests.coordinator_home import client, end, make_home, start, wait_until_up


def test_a_long_log_is_cut_while_it_is_written(tmp_path) -> None:
    log = tmp_path / "link.log"
    with log.open("ab") as writer:
        writer.write(b"x" * MAX_LOG_BYTES)
        writer.flush()
        rotate(log)
        assert log.stat().st_size == MAX_LOG_BYTES  # not longer than allowed
        writer.write(b"y")
        writer.flush()
        rotate(log)
        writer.write(b"after")
    assert (log.read_bytes(), log.with_suffix(".log.1").stat().st_size) == (b"after", MAX_LOG_BYTES + 1)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(60)
def test_nothing_is_left_when_the_supervisor_dies_and_a_new_one_takes_over(tmp_path) -> None:
    consortium = make_home(tmp_path / "home")
    first = start(consortium, "server.supervise")
    wait_until_up(consortium)
    children = psutil.Process(first.pid).children()
    assert len(children) == 2
    first.kill()
    first.wait()
    second = start(consortium, "server.supervise")
    try:
        gone, alive = psutil.wait_procs(children, timeout=20)
        assert (len(gone), alive) == (2, [])
        wait_until_up(consortium)
    finally:
        started = time.monotonic()
        assert end(second, 40) == 0
        assert time.monotonic() - started < 30


@pytest.mark.e2e
@pytest.mark.slow
def test_a_home_that_cannot_work_ends_with_its_code(tmp_path) -> None:
    consortium = make_home(tmp_path / "home")
    consortium.superexec_secret.chmod(0o644)
    process = start(consortium, "server.supervise")
    assert process.wait(40) == 7
    assert "chmod 600" in (consortium.logs / "test-server.supervise.log").read_text()


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_one_a_home_and_it_says_when_it_is_ready(tmp_path) -> None:
    consortium = make_home(tmp_path / "home")
    first = start(consortium, "server.supervise")
    log = consortium.logs / "test-server.supervise.log"
    try:
        while "ready: " not in log.read_text():
            assert first.poll() is None
            time.sleep(0.2)
        with client(consortium) as http:
            assert http.get("/health").status_code == 200
        settings = read_settings(consortium)
        assert f"ready: lab at 127.0.0.1:{settings.port}, 0 sites enrolled" in log.read_text()
        assert start(consortium, "server.supervise").wait(60) == ExitCode.STORAGE
        assert f"Another coordinator is at work there already ({consortium.lock})" in log.read_text()
        assert first.poll() is None
    finally:
        end(first, 40)
