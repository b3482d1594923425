"""The process of one run: started by the executor with the run's token on standard input, ends with the run.

Apart from the executor, which lives long and holds no torch. What runs is the installed release's ServerApp. Out of
scope: which runs are started (server/executor), what a run does (server/app).
"""

import functools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import NoReturn

from flwr.app import Context
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.logger import mirror_output_to_queue
from flwr.superlink.grid import http_grid
from flwr.superlink.runtime import run_serverapp

from common.errors import ExitCode, FedmedganError
from server.app import app
from server.consortium import Consortium, load_consortium
from server.executor import address, certificate

FIRST_RETRY_S = 0.05
"""A reply is announced while its parts are on their way; Flower would look for them again after 1 s, 2 s, 4 s."""


def run_one(consortium: Consortium, token: str) -> None:
    """Run the ServerApp whose token this is, in this process.

    What the run itself prints goes to the link, for whoever follows it; Flower's own words go to the executor's log.
    """
    printed: Queue[str | None] = Queue()
    http_grid.pull_objects = functools.partial(pull_objects, initial_backoff=FIRST_RETRY_S, backoff_cap=1.0)
    _log_apart()

    @app.lifespan()
    def heard(_: Context) -> Iterator[None]:  # pyright: ignore[reportUnusedFunction] - begins after Flower's preparations
        mirror_output_to_queue(printed)
        yield

    run_serverapp(
        runtime_api_address=address(consortium),
        log_queue=printed,
        token=token,
        insecure=False,
        certificates=certificate(consortium),
        runtime_dependency_install=False,
    )


def _log_apart() -> None:
    """Send Flower's log where no mirror of this process's output sees it."""
    apart = logging.StreamHandler(os.fdopen(os.dup(2), "w", buffering=1))
    apart.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    apart.addFilter(_brief)
    flower = logging.getLogger("flwr")
    flower.handlers, flower.propagate = [apart], False
    flower.setLevel(logging.INFO)


def _brief(record: logging.LogRecord) -> bool:
    """Write an error that a person can mend as its message, without the way that led there; drop empty lines."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, FedmedganError):
        record.msg, record.args, record.exc_info = "%s", (error,), None
    return bool(record.getMessage().strip())


def main() -> NoReturn:
    """Run, for the home that is named on the command line, what the token on standard input stands for."""
    run_one(load_consortium(Path(sys.argv[1])), sys.stdin.readline().strip())
    sys.exit(ExitCode.INTERNAL)  # Flower ends the process itself


if __name__ == "__main__":
    main()
