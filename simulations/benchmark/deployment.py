"""Where a round's seconds go in deployment: a coordinator and three sites on loopback, as real processes.

Training is next to nothing (one private step of a few patients), so that what is left is the overhead. Rows: the
greeting and the rounds of the default model, directly and through a proxy that counts bytes, and of a wide model of
100 MB. Out of scope: how a moment is told apart (benchmark/stopwatch, benchmark/split).
"""

import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import psutil

from common.config_text import build_config
from common.errors import FederationError
from server.records import read_records
from server.rounds import round_bytes
from simulations.benchmark import deployed
from simulations.benchmark.counting_proxy import CountingProxy, counting_proxy
from simulations.benchmark.deployed import SITES
from simulations.benchmark.report import Result
from simulations.benchmark.split import PARTS, Span, greeting, messages, read_spans, rounds, split
from simulations.phantoms.cohort import CLASSES

SAMPLE_S = 0.2
MIB = 1 << 20
ROLES = ("link", "serverapp", "agent", "relay")
RUN: Mapping[str, object] = {
    "image.size": 32,
    "image.classes": CLASSES,
    "privacy.epsilon": 8.0,
    "privacy.batch_patients": 8,
    "warmup.steps": 5,
    "warmup.batch_size": 8,
    "train.steps_per_round": 1,
    "train.d_steps_per_g_step": 1,
    "train.generator_batch": 4,
    "federation.connect_timeout_s": 600.0,
    "performance.threads": 1,
}
WIDE: Mapping[str, object] = {"generator_width": 256, "discriminator_width": 256, "latent_dim": 100}


@final
@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: Of its rows.
        rounds: Training rounds after the warm-up.
        model: Values of `[model]` other than the defaults.
        proxy: Whether the relays go through the counting proxy.
        idle_s: With the proxy: how long idle relays are watched before the run.
        constants: What the stopwatch sets, by module and name.
    """

    name: str
    rounds: int = 8
    model: Mapping[str, object] = field(default_factory=dict[str, object])
    proxy: bool = False
    idle_s: float = 10.0
    constants: Mapping[str, Mapping[str, object]] = field(default_factory=dict[str, Mapping[str, object]])


CASES = (Case("default"), Case("behind a proxy", rounds=4, proxy=True), Case("100 MB", rounds=2, model=WIDE))


def measure(cases: Sequence[Case] = CASES, changes: Mapping[str, object] | None = None) -> Result:
    """Run each case in a deployment of its own; return one row for its greeting and one for its rounds.

    Args:
        cases: The runs.
        changes: To the configuration of all.

    Raises:
        FederationError: Something did not start, or a run failed.
    """
    rows: list[dict[str, Any]] = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="fmg") as folder:
            rows += _rows(case, Path(folder), {**RUN, **(changes or {})})
    ratios: dict[str, float] = {}
    for row in rows:
        name = f"{row['case']} {row['what']}".replace(" ", "_")
        ratios[f"overhead_s_{name}"] = row["total_s"] - row["training_s"]
    return Result("deployment", rows, ratios)


def _rows(case: Case, folder: Path, changes: Mapping[str, object]) -> list[dict[str, Any]]:
    config = {**changes, "federation.rounds": case.rounds}
    config |= {f"model.{name}": value for name, value in case.model.items()}
    size = round_bytes(build_config({}, config))
    made = deployed.found(folder / "d", int(str(changes["image.size"])), 2 * size)
    sampler, constants = _Sampler(), json.dumps(case.constants)
    with contextlib.ExitStack() as stack:
        counted = stack.enter_context(counting_proxy()) if case.proxy else None
        proxy = f"http://127.0.0.1:{counted.port}" if counted else ""
        roles = stack.enter_context(deployed.running(made, proxy, constants))
        stack.enter_context(sampler.watching(roles))
        idle_mib = statistics.median(_memory(roles[f"relay {name}"], "VmRSS") for name in SITES) / MIB
        idle_bytes = _watch_idle(counted, case.idle_s)
        run = stack.enter_context(deployed.start_run(made, config, constants))
        while run.poll() is None:
            if counted is not None:
                sampler.note_bytes(counted)
            time.sleep(SAMPLE_S)
        if run.returncode:
            raise FederationError(f"The run ended with {run.returncode}:\n{deployed.said(made)}")
    spans, records = read_spans(made.spans), read_records(made.hub / "runs" / "run-0001" / "metrics.jsonl")
    heard = min(len(record.sites) for record in records)
    about = {
        "case": case.name,
        "heard": heard,
        "mb": size / 1e6,
        "idle_bytes_per_s": idle_bytes,
        "relay_idle_mib": idle_mib,
    }
    return [
        _row({**about, "what": "greeting"}, spans, [greeting(spans)], sampler),
        _row({**about, "what": "round"}, spans, rounds(spans), sampler),
    ]


def _row(
    about: Mapping[str, Any], spans: Sequence[Span], windows: Sequence[tuple[float, float]], sampler: "_Sampler"
) -> dict[str, Any]:
    """Return how the middle one of the stretches divides: its parts add up to it, as medians of each would not."""
    parts = [split(spans, *window) for window in windows]
    middle = sorted(range(len(windows)), key=lambda i: windows[i][1] - windows[i][0])[(len(windows) - 1) // 2]
    relayed = [seconds for window in windows for seconds in messages(spans, *window)]
    since, until = windows[0][0], windows[-1][1]
    return {
        "case": about["case"],
        "what": about["what"],
        "windows": len(windows),
        "heard": about["heard"],
        "mb": about["mb"],
        **{f"{part}_s": parts[middle][part] for part in PARTS},
        "total_s": windows[middle][1] - windows[middle][0],
        "relay_message_s": statistics.median(relayed) if relayed else None,
        "cpu_s": sampler.cpu_s(since, until) / len(windows),
        "site_bytes": _per_site(sampler.bytes_between(since, until), len(windows)),
        "idle_bytes_per_s": about["idle_bytes_per_s"],
        "relay_idle_mib": about["relay_idle_mib"],
        **{f"{role}_peak_mib": sampler.peaks.get(role, 0) / MIB for role in ROLES},
    }


def _per_site(size: int | None, windows: int) -> float | None:
    return None if size is None else size / windows / len(SITES)


def _watch_idle(counted: CountingProxy | None, seconds: float) -> float | None:
    """Return the bytes a second, both ways, of one relay that waits for work."""
    if counted is None:
        return None
    before, started = counted.bytes_through, time.monotonic()
    time.sleep(seconds)
    return (counted.bytes_through - before) / (time.monotonic() - started) / len(SITES)


@final
class _Sampler:
    """Peak memory by role, processor time of all, bytes through the proxy: looked at several times a second."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._used: list[tuple[float, float]] = []
        self._bytes: list[tuple[float, int]] = []

    @contextlib.contextmanager
    def watching(self, roles: Mapping[str, psutil.Process]) -> Generator[None]:
        """Watch these processes, and that of the run, until the block ends."""
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(roles, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def cpu_s(self, since: float, until: float) -> float:
        """Return the processor time that all took together."""
        return _at(self._used, until) - _at(self._used, since)

    def note_bytes(self, counted: CountingProxy) -> None:
        """Note how much went through."""
        self._bytes.append((time.monotonic(), counted.bytes_through))

    def bytes_between(self, since: float, until: float) -> int | None:
        """Return what went through; None without a proxy."""
        return int(_at(self._bytes, until) - _at(self._bytes, since)) if self._bytes else None

    def _watch(self, roles: Mapping[str, psutil.Process], stop: threading.Event) -> None:
        ended_s, run, run_s = 0.0, None, 0.0
        while not stop.wait(SAMPLE_S):
            now = dict(roles)
            if (started := deployed.run_of(roles["executor"])) is not None:
                now["serverapp"] = started
            if run is not None and started != run:
                ended_s, run_s = ended_s + run_s, 0.0
            run, total_s = started, ended_s
            for name, process in now.items():
                with contextlib.suppress(psutil.Error, OSError):
                    used = process.cpu_times()
                    seconds = used.user + used.system
                    total_s += seconds
                    run_s = seconds if name == "serverapp" else run_s
                    role = name.split(" ")[0]
                    self.peaks[role] = max(self.peaks.get(role, 0), _memory(process, "VmHWM"))
            self._used.append((time.monotonic(), total_s))


def _at(samples: Sequence[tuple[float, float]], when: float) -> float:
    """Return the last sample before a moment; the first where there is none."""
    value = samples[0][1] if samples else 0.0
    for at, sampled in samples:
        if at > when:
            break
        value = sampled
    return value


def _memory(process: psutil.Process, what: str) -> int:
    """Return a line of the kernel's status of a process, in bytes."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return 1024 * int(line.split()[1])
    return 0
