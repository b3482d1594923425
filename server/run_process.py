"""The process of one run: started by the executor with the run's token on standard input, ends with the run.

Apart from the executor, which lives long and holds no torch. What runs is the installed release's ServerApp. Out of
scope: which runs are started (server/executor), what a run does (server/app).
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import NoReturn, final

from flwr.app import Context
from flwr.supercore.logger import mirror_output_to_queue
from flwr.superlink.grid import http_grid
from flwr.superlink.runtime import run_serverapp

from common.errors import ExitCode, FedmedganError
from common.parts import fetch_parts
from server.app import app
from server.consortium import Consortium, load_consortium
from server.exchange import ANSWERS_UNTIL
from server.executor import address
from server.own_secrets import read_authority_pem

FLOWERS_LAST_WORDS = "Exit Code:"


def pull_reply(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
    """Fetch the parts of a reply, in the place of Flower's function of these parameters, which knows no bound.

    A reply is announced before its parts are sent: what is waited for is the site's whole upload. It has the time that
    the round has; at the deadline what is there is taken, and what is not costs its site this round.

    Raises:
        WireError: They are no parts of a reply, or too many or too large. server/exchange gives the answer up.
        ObjectPullError: A part is not there by the deadline. Flower's grid gives the answer up.

    Guarantees:
        - a_half_sent_reply_ends_with_the_round: Parts that do not come are waited for until the round's deadline.
    """
    return fetch_parts(object_ids, pull_object_fn, max(0.0, ANSWERS_UNTIL.get() - time.monotonic()))


def run_one(consortium: Consortium, token: str) -> None:
    """Run the ServerApp whose token this is, in this process.

    What the run itself prints goes to the link, for whoever follows it; Flower's own words go to the executor's log.
    """
    printed: Queue[str | None] = Queue()
    http_grid.pull_objects = pull_reply
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
        certificates=read_authority_pem(consortium),
        runtime_dependency_install=False,
    )


def _log_apart() -> None:
    """Send Flower's log where no mirror of this process's output sees it."""
    apart = logging.StreamHandler(os.fdopen(os.dup(2), "w", buffering=1))
    apart.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    apart.addFilter(_Brief())
    flower = logging.getLogger("flwr")
    flower.handlers, flower.propagate = [apart], False
    flower.setLevel(logging.INFO)


@final
class _Brief(logging.Filter):
    """Writes an error that a person can mend as its message, without the way that led there; drops empty lines.

    After such an error Flower's last words, an exit code and "unhandled exception", are dropped too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ended_with_a_reason = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is written; it may be changed."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FedmedganError):
            record.msg, record.args, record.exc_info = "%s", (error,), None
            self._ended_with_a_reason = True
            return True
        text = record.getMessage().strip()
        return bool(text) and not (self._ended_with_a_reason and text.startswith(FLOWERS_LAST_WORDS))


def main() -> NoReturn:
    """Run, for the home that is named on the command line, what the token on standard input stands for."""
    run_one(load_consortium(Path(sys.argv[1])), sys.stdin.readline().strip())
    sys.exit(ExitCode.INTERNAL)  # Flower ends the process itself


if __name__ == "__main__":
    main()
