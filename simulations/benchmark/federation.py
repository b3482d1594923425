"""Where a round's seconds go: training, aggregation, serialisation, other; for 2 and for 10 hospitals, interleaved."""

import functools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from client import agent, channel, replies
from client.app import make_app
from common import wire
from common.config_text import build_config
from server import aggregation
from server.app import Job, federate
from server.records import RoundRecord
from server.run_folder import open_run
from simulations.benchmark.report import Result
from simulations.engines import find_hospital
from simulations.hospitals import build_hospitals, draw_federation
from simulations.local_grid import LocalGrid

SITES = (2, 10)
ROUNDS = 5
PATIENTS_A_SITE = 80
PARTS = {
    "training": ((agent, "train_round"),),
    "aggregation": ((aggregation, "add_to_mean"), (aggregation, "step"), (aggregation, "average")),
    "serialisation": (
        (wire, "encode_requests"),
        (wire, "decode_request"),
        (wire, "encode_reply"),
        (wire, "decode_reply"),
        (replies, "pack_reply"),
        (channel, "unpack_reply"),
    ),
}
"""The functions whose time counts for each part; none of them calls another one of the list."""


def measure() -> Result:
    """Run rounds of two federations in turn and split the seconds of each."""
    spent: Counter[str] = Counter()
    samples: dict[int, list[dict[str, float]]] = {sites: [] for sites in SITES}
    with tempfile.TemporaryDirectory() as folder, _timed(spent):
        runs = {sites: _federation(sites, Path(folder) / str(sites)) for sites in SITES}
        for events in runs.values():
            _until_round(events)  # the warm-up; also fills caches
        for _ in range(ROUNDS):
            for sites, events in runs.items():
                spent.clear()
                started = time.perf_counter()
                _until_round(events)
                total = time.perf_counter() - started
                samples[sites].append({**{part: spent[part] for part in PARTS}, "total": total})
    rows = [_row(sites, rounds) for sites, rounds in samples.items()]
    ratios = {f"overhead_share_{row['sites']}_sites": 1 - row["training_s"] / row["total_s"] for row in rows}
    return Result("federation", rows, ratios)


def _federation(sites: int, out: Path) -> Iterator[Any]:
    changes = {
        "simulation.sites": sites,
        "simulation.partition": "iid",
        "simulation.phantom_patients": PATIENTS_A_SITE * sites,
        "simulation.holdout": 0.0,
        "federation.rounds": ROUNDS,
        "warmup.steps": 1,
    }
    federation = draw_federation(build_config({}, changes))
    folder = open_run(out, federation.config, resume=False)
    for _ in build_hospitals(federation, out):
        pass
    client_app = make_app(functools.partial(find_hospital, out, federation.config))
    return federate(LocalGrid(client_app, sites), Job(federation.config, folder))


def _until_round(events: Iterator[Any]) -> None:
    while not isinstance(next(events), RoundRecord):
        pass


def _row(sites: int, rounds: list[dict[str, float]]) -> dict[str, Any]:
    median = {part: statistics.median(sample[part] for sample in rounds) for part in (*PARTS, "total")}
    other = median["total"] - sum(median[part] for part in PARTS)
    return {
        "sites": sites,
        "rounds": len(rounds),
        **{f"{part}_s": seconds for part, seconds in median.items()},
        "other_s": other,
    }


@contextmanager
def _timed(spent: Counter[str]) -> Generator[None]:
    """Add up the seconds of the listed functions; they are wrapped for as long as the benchmark runs."""
    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for module, name in functions:
                stack.enter_context(patch.object(module, name, _clocked(getattr(module, name), part, spent)))
        yield


def _clocked(function: Callable[..., Any], part: str, spent: Counter[str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def clocked(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            spent[part] += time.perf_counter() - started  # type: ignore[assignment]  # a Counter of seconds

    return clocked
