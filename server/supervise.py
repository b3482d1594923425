"""The coordinator's two processes, started and kept: the link, and the executor of the runs.

They are apart so that a run survives a restart of the link. Each writes one log, rotated here. Out of scope: what they
do (server/link, server/executor).
"""

import logging
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import NoReturn, final

from common.errors import ExitCode, FedmedganError
from common.files import make_folder
from common.flower_environment import flower_environment
from common.lock import alone
from server.consortium import Consortium, load_consortium, read_settings, records
from server.own_secrets import read_authority_pem

LOG = logging.getLogger("fedmedgan.coordinator")

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
HEALTHY_S = 60.0
"""A process that ran for this long starts again with the shortest delay."""
MAX_LOG_BYTES = 10 << 20
STOP_S = 30.0
_WATCH_S = 0.2
_ANSWER_S = 2.0
_SUPERVISED = "--supervised"


@final
@dataclass
class Child:
    """One of the two processes."""

    module: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    due: float = 0.0
    delay_s: float = FIRST_DELAY_S


@final
@dataclass(frozen=True)
class Started:
    """What a process of the coordinator is given when it starts.

    Attributes:
        home: The coordinator's home.
        stop: Set by SIGTERM, SIGINT and the end of the supervisor.
        asked: Set by a signal alone: somebody wants an end, and did not just die.
    """

    home: Path
    stop: threading.Event
    asked: threading.Event


@contextmanager
def started_process() -> Generator[Started]:
    """Set up this process as one of the coordinator's, from its command line; an error becomes its exit code."""
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True)
    logging.getLogger("flwr").handlers.clear()  # it would write each line twice, once in colours
    logging.getLogger("flwr").setLevel(logging.INFO)
    for chatty in ("alembic", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    started = Started(Path(sys.argv[1]), threading.Event(), threading.Event())

    def end(*_: object) -> None:
        started.asked.set()
        started.stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    if _SUPERVISED in sys.argv[2:]:
        threading.Thread(target=_end_with_supervisor, args=(started.stop,), daemon=True).start()
    try:
        yield started
    except FedmedganError as error:
        LOG.error("%s", error)
        sys.exit(error.exit_code)


def supervise(consortium: Consortium, stop: threading.Event) -> ExitCode:
    """Run link and executor until `stop` is set; start again what ends, with growing delays.

    Args:
        consortium: The coordinator's home.
        stop: Ends both: first the executor with its runs, then the link.

    Returns:
        OK after a stop; the exit code of a process that says that starting it again is of no use.

    Raises:
        StorageError: Another coordinator is at work on this home, or the authority's certificate cannot be read.

    Guarantees:
        - one_a_home: A second one on the same home ends before it starts anything.
    """
    with alone(consortium.lock, "coordinator"):
        read_authority_pem(consortium)
        return _supervise(consortium, stop)


def _supervise(consortium: Consortium, stop: threading.Event) -> ExitCode:
    make_folder(consortium.logs, 0o700)
    make_folder(consortium.runs, 0o700)
    link, executor = (Child(f"server.{name}", consortium.logs / f"{name}.log") for name in ("link", "executor"))
    children, ready = [link, executor], None
    try:
        while not stop.wait(_WATCH_S):
            for child in children:
                if (final_code := _keep(child, consortium)) is not None:
                    print(f"error: {child.module} ended: {_last_line(child.log)}", file=sys.stderr)
                    return final_code
                rotate(child.log)
            if ready is not link.process and link.process is not None and _answers(consortium):
                ready = link.process
                print(_ready(consortium), flush=True)
    finally:
        for child in (executor, link):
            _end(child)
    return ExitCode.OK


def _keep(child: Child, consortium: Consortium) -> ExitCode | None:
    now = time.monotonic()
    if child.process is None:
        if now >= child.due:
            _start(child, consortium)
        return None
    code = child.process.poll()
    if code is None:
        return None
    if code in set(ExitCode) - {ExitCode.OK, ExitCode.INTERNAL, ExitCode.INTERRUPTED}:
        return ExitCode(code)
    if now - child.started > HEALTHY_S:
        child.delay_s = FIRST_DELAY_S
    LOG.warning("%s ended with %d; it starts again in %.0f s", child.module, code, child.delay_s)
    child.process, child.due = None, now + child.delay_s
    child.delay_s = min(2 * child.delay_s, LONGEST_DELAY_S)
    return None


def _start(child: Child, consortium: Consortium) -> None:
    command = [sys.executable, "-P", "-m", child.module, str(consortium.folder), _SUPERVISED]
    environment = flower_environment(consortium.folder)
    with child.log.open("ab") as log:
        child.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
    child.started = time.monotonic()
    LOG.info("%s runs as process %d, log %s", child.module, child.process.pid, child.log)


def _answers(consortium: Consortium) -> bool:
    """Return whether the public port answers with this home's certificate."""
    try:
        trust = ssl.create_default_context(cafile=str(consortium.ca_pem))
        connection = HTTPSConnection("127.0.0.1", read_settings(consortium).port, timeout=_ANSWER_S, context=trust)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == HTTPStatus.OK
        finally:
            connection.close()
    except (OSError, HTTPException):
        return False


def _ready(consortium: Consortium) -> str:
    settings = read_settings(consortium)
    try:
        count = sum(record.revoked is None for record in records(consortium).values())
        listed = f"{count} {'site' if count == 1 else 'sites'} enrolled"
    except FedmedganError as error:  # the link goes on with the sites that it knows, and so does this
        count, listed = 0, str(error).rstrip(".")
    hint = "" if count else f"; next: fedmedgan-coordinator enrol {consortium.folder} NAME.enrolment.json"
    return f"ready: {settings.name} at {settings.address}, {listed}, logs in {consortium.logs}{hint}"


def _end(child: Child) -> None:
    if child.process is None:
        return
    child.process.terminate()
    try:
        child.process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.process.kill()
        child.process.wait()


def rotate(log: Path) -> None:
    """Cut a log that has grown too long, and keep what was in it as `.log.1`.

    Copied and cut, not renamed: the process goes on writing to the same file, at its end.
    """
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        shutil.copyfile(log, log.with_suffix(".log.1"))
        os.truncate(log, 0)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "its log is empty"


def _end_with_supervisor(stop: threading.Event) -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock this thread would hold at the end of the process
        continue
    stop.set()


def main() -> NoReturn:
    """Supervise the home that is named on the command line, until SIGTERM or Ctrl-C."""
    with started_process() as process:
        code = supervise(load_consortium(process.home), process.stop)
    sys.exit(code)


if __name__ == "__main__":
    main()
