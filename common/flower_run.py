"""Where a run started by `flwr run` keeps its folder: ServerApp and virtual hospitals must find the same one."""

from pathlib import Path

HERE = "here"
"""Of the run configuration's `consortium`: the home of the coordinator that runs this. Its path is nobody's business:
each site may read the run configuration."""


def run_path(out: object, flower_run_id: int) -> Path:
    """Return the run folder that `out` of the run configuration names, or the one of Flower's run id.

    >>> run_path("", 7)
    PosixPath('runs/flwr-7')
    """
    return Path(out) if isinstance(out, str) and out else Path("runs") / f"flwr-{flower_run_id}"
