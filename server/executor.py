"""The executor: takes runs from the link under a secret and runs each in a process of its own.

Both are apart from the link, so that a run goes on while the link restarts. It starts runs of the installed release
only, and nothing but ServerApps; the token of a run reaches its process through a pipe, where no other user sees it.
Out of scope: what a run does (server/app).
"""

import logging
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, final

import httpx
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from common.errors import ExitCode
from common.lock import alone
from server.bundle import build_bundle, bundle_hash
from server.consortium import Consortium, load_consortium, read_settings
from server.control import KILLED
from server.own_secrets import read_authority_pem, read_secret
from server.supervise import Started, started_process

LOG = logging.getLogger("fedmedgan.executor")

POLL_S = 1.0
AWAY_S = 2.0
"""Between two tries while the link does not answer."""
STOP_S = 20.0
"""What a run may take to say goodbye."""
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
RUN = "--run"
"""A word by which the process of a run is known from the others."""


ANOTHER_RELEASE = (
    "The release that was installed when the coordinator started is another than the one that started the run. Restart "
    "`fedmedgan-coordinator start`"
)


@final
@dataclass(frozen=True)
class Running:
    """A run under way.

    Attributes:
        run_id: The link's number of it.
        token: With which its process speaks to the link.
        process: Its process.
        lock: Held by the process as long as it lives, from its first moment on.
    """

    run_id: int
    token: str = field(repr=False)
    process: subprocess.Popen[bytes]
    lock: Path


def execute(consortium: Consortium, process: Started) -> None:
    """Take and start runs until the process is asked to stop; then end them, unless only the supervisor died.

    Raises:
        StorageError: Secret or certificate cannot be read.
        ConfigError: federation.toml is wrong.

    Guarantees:
        - a_killed_run_ends: The link hears at once of a run whose process ended without a word.
    """
    ours = bundle_hash(build_bundle())
    running: list[Running] = []
    while not process.stop.is_set():
        with _connect(consortium) as client:  # anew after each failure: the certificates may have been renewed
            while not process.stop.is_set():
                try:
                    running = [run for run in running if not _has_ended(consortium, run)]
                    acquired = _acquire(consortium, client, ours)
                except (httpx.HTTPError, ValueError) as error:  # ValueError: an answer that does not decode
                    LOG.info("the link hands out no runs: %s", error)
                    break
                if acquired is not None:
                    running.append(_start(consortium, *acquired))
                process.stop.wait(POLL_S)
        process.stop.wait(AWAY_S)
    if process.asked.is_set():
        _end(running)


def _has_ended(consortium: Consortium, run: Running) -> bool:
    """Look whether a run's process has ended; of one that was killed tell the link, which else waits for a minute.

    Raises:
        httpx.HTTPError: The link is away; it is told at the next look.
    """
    code = run.process.poll()
    if code is None:
        return False
    if code < 0:  # by a signal that it could not answer
        LOG.error("run %d: %s by signal %d", run.run_id, KILLED, -code)
        _tell_failed(consortium, run.token, KILLED)
    run.lock.unlink(missing_ok=True)
    return True


def _tell_failed(consortium: Consortium, token: str, details: str) -> None:
    output = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=details)
    try:
        with closing(_client(consortium, RuntimeTokenHttpInterceptor(token=token))) as client:
            client.PushTaskOutput(output)
    except httpx.HTTPStatusError as error:  # it was stopped, or has been missed already
        LOG.info("the link knows of the end: %s", error)


def _acquire(consortium: Consortium, client: RuntimeHttpClient, ours: str) -> tuple[int, str] | None:
    """Ask for a run; return its number and its token, or nothing."""
    answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
    if not answer.HasField("task") or not answer.token:
        return None
    if answer.task.fab_hash != ours:
        LOG.error("run %d is of another release than the installed one; it is not started", answer.task.run_id)
        _tell_failed(consortium, answer.token, ANOTHER_RELEASE)
        return None
    LOG.info("run %d starts", answer.task.run_id)
    return answer.task.run_id, answer.token


def _start(consortium: Consortium, run_id: int, token: str) -> Running:
    command = [sys.executable, "-P", "-m", "server.run_process", str(consortium.folder), RUN]
    lock = consortium.run_lock(run_id)
    with alone(lock, "run") as held:  # handed on: from here on the process holds it, whatever becomes of this one
        process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, pass_fds=[held])
    if process.stdin is not None:
        with process.stdin as pipe:
            pipe.write(token.encode() + b"\n")
    return Running(run_id, token, process, lock)


def _end(running: list[Running]) -> None:
    for run in running:
        run.process.terminate()
    for run in running:
        try:
            run.process.wait(STOP_S)
            run.lock.unlink(missing_ok=True)
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.process.wait()


def _connect(consortium: Consortium) -> RuntimeHttpClient:
    secret = SuperExecAuthHttpInterceptor(
        master_secret=read_secret(consortium), protected_methods=frozenset({_ACQUIRE})
    )
    return _client(consortium, secret)


def _client(consortium: Consortium, credential: ProtobufClientInterceptor) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address(consortium),
        insecure=False,
        root_certificates=read_authority_pem(consortium),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), credential],
    )


def address(consortium: Consortium) -> str:
    """Return where the link's runtime API is."""
    return f"127.0.0.1:{read_settings(consortium).control_port}"


def main() -> NoReturn:
    """Execute runs of the home that is named on the command line."""
    with started_process() as process:
        execute(load_consortium(process.home), process)
    sys.exit(ExitCode.OK)


if __name__ == "__main__":
    main()
