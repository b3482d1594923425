"""The executor: takes runs from the link under a secret and runs each in a process of its own.

Both are apart from the link, so that a run goes on while the link restarts. It starts runs of the installed release
only, and nothing but ServerApps; the token of a run reaches its process through a pipe, where no other user sees it.
Out of scope: what a run does (server/app).
"""

import logging
import subprocess
import sys
from typing import NoReturn

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from common.errors import ExitCode, StorageError
from server.bundle import build_bundle, bundle_hash
from server.consortium import Consortium, load_consortium, read_settings
from server.own_secrets import read_secret
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


def execute(consortium: Consortium, process: Started) -> None:
    """Take and start runs until the process is asked to stop; then end them, unless only the supervisor died.

    Raises:
        StorageError: Secret or certificate cannot be read.
        ConfigError: federation.toml is wrong.
    """
    ours = bundle_hash(build_bundle())
    running: list[subprocess.Popen[bytes]] = []
    while not process.stop.is_set():
        with _connect(consortium) as client:  # anew after each failure: the certificates may have been renewed
            while not process.stop.is_set():
                running = [run for run in running if run.poll() is None]
                try:
                    token = _acquire(client, ours)
                except (httpx.HTTPError, ValueError) as error:  # ValueError: an answer that does not decode
                    LOG.info("the link hands out no runs: %s", error)
                    break
                if token:
                    running.append(_start(consortium, token))
                process.stop.wait(POLL_S)
        process.stop.wait(AWAY_S)
    if process.asked.is_set():
        _end(running)


def _acquire(client: RuntimeHttpClient, ours: str) -> str:
    """Ask for a run; return its token, or nothing."""
    answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
    if not answer.HasField("task") or not answer.token:
        return ""
    if answer.task.fab_hash != ours:
        LOG.error("run %d is of another release than the installed one; it is not started", answer.task.run_id)
        return ""
    LOG.info("run %d starts", answer.task.run_id)
    return answer.token


def _start(consortium: Consortium, token: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "server.run_process", str(consortium.folder), RUN]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    if run.stdin is not None:
        with run.stdin as pipe:
            pipe.write(token.encode() + b"\n")
    return run


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    for run in running:
        run.terminate()
    for run in running:
        try:
            run.wait(STOP_S)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()


def _connect(consortium: Consortium) -> RuntimeHttpClient:
    secret = SuperExecAuthHttpInterceptor(
        master_secret=read_secret(consortium), protected_methods=frozenset({_ACQUIRE})
    )
    return RuntimeHttpClient.from_server_address(
        server_address=address(consortium),
        insecure=False,
        root_certificates=certificate(consortium),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), secret],
    )


def address(consortium: Consortium) -> str:
    """Return where the link's runtime API is."""
    return f"127.0.0.1:{read_settings(consortium).control_port}"


def certificate(consortium: Consortium) -> bytes:
    """Return the authority's certificate, in PEM.

    Raises:
        StorageError: It cannot be read.
    """
    try:
        return consortium.ca_pem.read_bytes()
    except OSError as error:
        raise StorageError(f"Could not read {consortium.ca_pem}: {error.strerror}. Restore it.") from error


def main() -> NoReturn:
    """Execute runs of the home that is named on the command line."""
    with started_process() as process:
        execute(load_consortium(process.home), process)
    sys.exit(ExitCode.OK)


if __name__ == "__main__":
    main()
