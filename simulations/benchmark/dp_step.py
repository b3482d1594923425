"""One private step of the discriminator: the fast engine beside an ordinary step and every mode of Opacus.

Seconds, noise and optimiser included, and peak memory, on one batch of patients with one image each. Every engine draws
its noise from torch's generator, so that engines are compared; what secret noise costs on top is measured beside.
"""

import functools
import itertools
import math
import sys
from dataclasses import dataclass, replace
from typing import final

from common.config import ModelConfig, PerformanceConfig
from simulations.benchmark.modes import OPACUS_MODES, Cell, set_up
from simulations.benchmark.report import Result
from simulations.benchmark.turns import Limits, Measured, figures, take_turns

MODEL, LIMITS = ModelConfig(), Limits()
NOISE_SIZE = 32  # that of the default configuration

Found = dict[tuple[int, int, int, str], Measured]  # by size, patients, fakes and mode


@final
@dataclass(frozen=True)
class Plan:
    """What is measured, how often; the defaults are the benchmark.

    Attributes:
        sizes: Pixels along each side.
        batches: Patients in a step, ascending.
        ratio_batch: The batch that ratios and rows with fakes are about.
        ratio_s: Seconds for which the modes take turns in a cell of the ratios, slow or not, at least.
        limits: In the other cells.
        model: The discriminator.
        threads: Of one tensor operation.
        device: Where the discriminator is trained.
        bf16: Activations of plain and fast have eight bits.
    """

    sizes: tuple[int, ...] = (28, 32, 64)
    batches: tuple[int, ...] = (32, 64, 128, 256, 512)
    ratio_batch: int = 128
    ratio_s: float = 10.0
    limits: Limits = LIMITS
    model: ModelConfig = MODEL
    threads: int = PerformanceConfig().threads
    device: str = "cpu"
    bf16: bool = False


FULL = Plan()


def measure(plan: Plan = FULL) -> Result:
    """Measure every mode at every size and batch, one cell after the other."""
    found: Found = {}
    private = ("plain", "fast")
    for size, batch in itertools.product(plan.sizes, plan.batches):
        print(f"dp-step: {size} px, batch {batch}", file=sys.stderr, flush=True)
        modes = (*private, *(f"opacus {mode}" for mode in OPACUS_MODES))
        if (size, batch) == (NOISE_SIZE, plan.ratio_batch):
            modes += ("torch noise", "secure noise")
        _measure(plan, found, Cell(size, batch, 0, plan.model, plan.device, plan.bf16), modes)
        if batch == plan.ratio_batch:
            _measure(plan, found, Cell(size, batch, batch, plan.model, plan.device, plan.bf16), private)
    rows = [
        {"size": size, "batch": batch, "fakes": fakes, "mode": mode} | figures(one, found[size, batch, fakes, "plain"])
        for (size, batch, fakes, mode), one in found.items()
    ]
    return Result("dp-step", rows, _ratios(plan, found))


def _measure(plan: Plan, found: Found, cell: Cell, modes: tuple[str, ...]) -> None:
    limits = plan.limits
    if cell.batch == plan.ratio_batch:
        limits = replace(limits, at_least_s=plan.ratio_s, slow_s=math.inf)
    expected = {mode: _expected_bytes(found, cell.size, cell.batch, mode) for mode in modes}
    setups = {mode: functools.partial(set_up, cell, mode) for mode in modes}
    for mode, one in take_turns(setups, limits, expected, plan.threads).items():
        found[cell.size, cell.batch, cell.fakes, mode] = one


def _expected_bytes(found: Found, size: int, batch: int, mode: str) -> float:
    """Expect as much for each patient as at smaller batches; 0 when there was none."""
    peaks = [one.peak_bytes / key[1] for key, one in found.items() if (key[0], key[3]) == (size, mode)]
    return batch * max(peaks, default=0.0)


def _ratios(plan: Plan, found: Found) -> dict[str, float]:
    """Put the figures of merit together, from the fastest steps at the ratios' batch without fakes."""
    cells = {
        (size, mode): one
        for (size, batch, fakes, mode), one in found.items()
        if (batch, fakes) == (plan.ratio_batch, 0)
    }
    fastest = {key: min(one.seconds) for key, one in cells.items() if not one.skipped}
    ratios: dict[str, float] = {}
    for size in (28, 64):
        best = min(fastest[size, f"opacus {mode}"] for mode in OPACUS_MODES if (size, f"opacus {mode}") in fastest)
        ratios[f"fast_over_plain_{size}"] = fastest[size, "fast"] / fastest[size, "plain"]
        ratios[f"opacus_best_over_plain_{size}"] = best / fastest[size, "plain"]
        ratios[f"fast_over_opacus_best_{size}"] = fastest[size, "fast"] / best
    ratios["fast_memory_over_plain_28"] = cells[28, "fast"].peak_bytes / cells[28, "plain"].peak_bytes
    extra = fastest[NOISE_SIZE, "secure noise"] - fastest[NOISE_SIZE, "torch noise"]
    ratios["secure_noise_share"] = extra / fastest[NOISE_SIZE, "fast"]
    return ratios
