"""The supervisor's logs, and its end."""

import time

import psutil
import pytest

from server.supervise import MAX_LOG_BYTES, rotate
from tests.coordinator_home import end, make_home, start, wait_until_up


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
