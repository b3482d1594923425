"""Steps of several modes in turn, so that what slows the machine down slows them all: seconds and peak memory.

Ratios are of the fastest steps, for other work on the machine only ever adds time; it moves medians, and ratios within
a round, far more. Where the fastest steps of a mode do not agree, its row says `busy`.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, final

import torch

from simulations.benchmark.memory import peak_bytes

SLOW_ROUNDS = 3
STEPS = 3
"""Steps of one turn: the first finds what others left in the caches."""

Step = Callable[[], None]
SetUp = Callable[[], Step]
"""Makes a model, its optimiser and whatever an engine keeps from step to step."""


@final
@dataclass(frozen=True)
class Limits:
    """How often, and what is left out.

    Attributes:
        rounds: Turns of every mode, at least.
        at_least_s: Seconds for which turns go on beyond; up to three times as long while a mode is unsettled.
        slow_s: A mode with a longer step takes three turns only.
        max_peak_bytes: A mode that is expected to need more is skipped.
    """

    rounds: int = 7
    at_least_s: float = 0.0
    slow_s: float = 0.3
    max_peak_bytes: int = 8 << 30


@final
@dataclass(frozen=True)
class Measured:
    """The steps of one mode.

    Attributes:
        seconds: Of each step; none when the mode was skipped.
        peak_bytes: Of setting up and taking one step, on one thread: all but the data. An engine that works on several
            threads at a time needs nearly as much for each.
        skipped: Why there are none; empty otherwise.
    """

    seconds: tuple[float, ...] = ()
    peak_bytes: int = 0
    skipped: str = ""


def take_turns(
    setups: Mapping[str, SetUp], limits: Limits, expected_bytes: Mapping[str, float], threads: int
) -> dict[str, Measured]:
    """Let every mode step in turn, each in a process of its own, then measure its memory.

    Args:
        setups: What makes the step, by mode; goes to another process. The first is what the others are compared to, and
            never skipped.
        limits: How often, and what is left out.
        expected_bytes: Peaks by mode, as far as anything is known.
        threads: Of each process.

    Returns:
        What was measured, by mode.

    Raises:
        RuntimeError: A mode's process ended; what it printed says why.
    """
    first = next(iter(setups))
    skipped = {mode: _too_much(expected_bytes.get(mode, 0.0), limits) for mode in setups if mode != first}
    with ExitStack() as stack:
        wanted = {mode: setup for mode, setup in setups.items() if not skipped.get(mode)}
        running = {mode: stack.enter_context(_process(mode, setup, threads)) for mode, setup in wanted.items()}
        slow = {mode for mode, ask in running.items() if min(ask("turn")) > limits.slow_s}
        seconds: dict[str, list[float]] = {mode: [] for mode in running}
        started, done = time.perf_counter(), 0
        while done < limits.rounds or not _enough(seconds, limits, time.perf_counter() - started):
            for mode, ask in running.items():
                if done < SLOW_ROUNDS or mode not in slow:
                    seconds[mode] += ask("turn")
            done += 1
        peaks = {mode: int(ask("peak")[0]) for mode, ask in running.items()}
    return {
        mode: Measured(tuple(seconds[mode]), peaks[mode]) if mode in running else Measured(skipped=skipped[mode])
        for mode in setups
    }


def figures(one: Measured, other: Measured) -> dict[str, Any]:
    """Return the columns of a mode, beside the one it is compared to; None where it was skipped."""
    if one.skipped:
        names = ("rounds", "median_ms", "min_ms", "time_ratio", "peak_mib", "peak_ratio")
        return {**dict.fromkeys(names), "note": one.skipped}
    return {
        "rounds": len(one.seconds),
        "median_ms": 1e3 * statistics.median(one.seconds),
        "min_ms": 1e3 * min(one.seconds),
        "time_ratio": min(one.seconds) / min(other.seconds),
        "peak_mib": one.peak_bytes / 2**20,
        "peak_ratio": one.peak_bytes / other.peak_bytes,
        "note": "" if _settled(one.seconds) else "busy",
    }


def _enough(seconds: Mapping[str, list[float]], limits: Limits, passed_s: float) -> bool:
    if passed_s < limits.at_least_s:
        return False
    return passed_s >= 3 * limits.at_least_s or all(_settled(of_mode) for of_mode in seconds.values())


def _settled(seconds: Sequence[float]) -> bool:
    """Say whether five steps, or all, agree on what the fastest takes; on a busy machine they do not."""
    ordered = sorted(seconds)
    return ordered[min(4, len(ordered) - 1)] <= 1.1 * ordered[0]


def _too_much(expected_bytes: float, limits: Limits) -> str:
    return f"would take {expected_bytes / 2**30:.1f} GiB" if expected_bytes > limits.max_peak_bytes else ""


@contextmanager
def _process(mode: str, setup: SetUp, threads: int) -> Generator[Callable[[str], list[float]]]:
    """Start a process for a mode, and ask it for turns and for its peak; it ends with the context."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("forkserver")  # whose server imports all once, and computes nothing
    context.set_forkserver_preload(["simulations.benchmark.modes"])
    process = context.Process(target=_serve, args=(there, setup, threads), daemon=True)
    process.start()
    there.close()

    def ask(wish: str) -> list[float]:
        try:
            here.send(wish)
            answer: list[float] = here.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"Expected the process of mode {mode!r} to go on; it ended.") from error
        return answer

    try:
        yield ask
    finally:
        here.close()  # which ends it
        process.join()


def _serve(wishes: Connection, setup: SetUp, threads: int) -> None:
    torch.set_num_threads(threads)
    step = setup()
    step()  # the warm-up
    while True:
        try:
            wish = wishes.recv()
        except EOFError:
            return
        wishes.send([_seconds(step) for _ in range(STEPS)] if wish == "turn" else [_peak_on_one_thread(setup)])


def _peak_on_one_thread(setup: SetUp) -> int:
    """Count the model, the optimiser's state and what an engine keeps too; the record is of this thread alone."""
    torch.set_num_threads(1)
    return peak_bytes(lambda: setup()())


def _seconds(step: Step) -> float:
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
