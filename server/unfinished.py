"""Why a run has no results yet, and what leads to them, for who asks for images or a report too early.

Out of scope: the words of each end (server/status_text).
"""

import shlex
import time
from pathlib import Path

from common.errors import FedmedganError, ResumeError
from common.lock import is_held
from server import control
from server.consortium import Consortium
from server.control import RunStatus
from server.run_folder import RunFolder
from server.status import COMPLETED, stand, under_way, without_process
from server.status_text import how_it_ended


def unfinished(consortium: Consortium, path: Path, named: Path) -> ResumeError:
    """Return the error of a run without results: at work, broken off, or refused for good.

    Args:
        consortium: The coordinator's home.
        path: The run's folder.
        named: As the person named it, for the command to type.
    """
    home, run = shlex.quote(str(consortium.folder)), shlex.quote(str(named))
    runs = [one for one in _runs(consortium) if one.folder == path]
    if is_held(RunFolder(path, "").lock) or under_way(runs, without_process(consortium, runs)):
        return ResumeError(
            f"The run of {path} is at work. Wait for its end (fedmedgan-coordinator status {home}), or end it: "
            f"fedmedgan-coordinator stop {home} {run}"
        )
    for standing in stand([], runs, time.time(), without_process(consortium, runs))[1]:
        if standing.state != COMPLETED:
            return ResumeError(f"There are no results of it: {how_it_ended(standing, consortium.folder)}")
    return ResumeError(f"The run of {path} is not finished: fedmedgan-coordinator resume {home} {run}")


def _runs(consortium: Consortium) -> list[RunStatus]:
    """Return what the link knows of runs; nothing where it does not answer."""
    try:
        with control.connect(consortium) as client:
            return control.list_runs(client, consortium.folder)
    except FedmedganError:
        return []
