"""Sites that are functions, and the round loop over a grid of them in this process."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context

from client.app import make_app
from common.config import Config
from common.errors import RefusalCode
from common.messages import PROTOCOL_VERSION, Arrays, Kind, Reply, Request, Scalar
from server.app import Job, federate
from server.records import RoundRecord
from server.run_folder import open_run
from simulations.local_grid import LocalGrid

SMALL_RUN: Mapping[str, Any] = {
    "image.size": 28,
    "image.classes": ("a", "b"),
    "model.name": "mlp",
    "model.generator_width": 8,
    "model.discriminator_width": 8,
    "warmup.share": 0.0,
    "federation.rounds": 3,
    "federation.connect_timeout_s": 5.0,
    "simulation.sites": 3,
}

Release = Callable[[int, Request, Any], tuple[Mapping[str, Scalar], Arrays]]
"""Makes fields and arrays of a reply from the site's index, the request and what its function answered."""


def run_sites(
    tmp_path: Path, config: Config, behaviours: Sequence[Callable[[Request], Any]], release: Release
) -> list[RoundRecord]:
    """Run a federation of functions, which answer with a refusal or with what `release` understands."""

    def connect(context: Context) -> Callable[[Request], Reply]:
        index = int(context.node_config["partition-id"])
        return functools.partial(_answer, index, behaviours[index], release)

    grid = LocalGrid(make_app(connect), len(behaviours))
    job = Job(config, open_run(tmp_path / "run", config, config.run.resume))
    return [event for event in federate(grid, job) if isinstance(event, RoundRecord)]


def _answer(index: int, behaviour: Callable[[Request], Any], release: Release, request: Request) -> Reply:
    if request.kind is Kind.HELLO:
        fields = {"site": f"site-{index}", "declared_patients": 100 * (index + 1), "protocol": PROTOCOL_VERSION}
        return Reply(request.kind, request.run_id, request.round, None, fields)
    answer = behaviour(request)
    if isinstance(answer, RefusalCode):
        return Reply(request.kind, request.run_id, request.round, answer)
    return Reply(request.kind, request.run_id, request.round, None, *release(index, request, answer))
