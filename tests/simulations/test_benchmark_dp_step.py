"""The benchmark of one private step: its form, its modes, and the memory it counts. Never a time."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from common.config import ImageConfig, ModelConfig
from common.models import build
from simulations.benchmark.dp_step import Plan, measure
from simulations.benchmark.memory import peak_bytes
from simulations.benchmark.modes import CLASSES, OPACUS_MODES, make_data, opacus, plain, private, torch_noise
from simulations.benchmark.report import Result, print_result
from simulations.benchmark.turns import SLOW_ROUNDS, STEPS, Limits, Measured, Step, figures, take_turns

SMALL = ModelConfig(discriminator_width=8)
TINY = Plan(batches=(2, 4), ratio_batch=2, ratio_s=0.0, limits=Limits(rounds=1), model=SMALL, threads=1)
RATIOS = {
    "fast_over_plain_28",
    "fast_over_plain_64",
    "opacus_best_over_plain_28",
    "opacus_best_over_plain_64",
    "fast_over_opacus_best_28",
    "fast_over_opacus_best_64",
    "fast_memory_over_plain_28",
    "secure_noise_share",
}


def set_up_nothing() -> Step:
    return lambda: None


def set_up_a_failure() -> Step:
    raise ValueError("the reason")


@pytest.fixture(scope="module")
def tiny() -> Result:
    return measure(TINY)


@pytest.mark.slow
@pytest.mark.xdist_group("dp_step")
def test_ratios_are_present_and_finite(tiny: Result) -> None:
    assert set(tiny.ratios) == RATIOS
    assert all(math.isfinite(value) for value in tiny.ratios.values())
    assert all(value > 0 for name, value in tiny.ratios.items() if name != "secure_noise_share")


@pytest.mark.slow
@pytest.mark.xdist_group("dp_step")
def test_every_mode_has_a_row_in_every_cell(tiny: Result, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {(row["size"], row["batch"], row["fakes"], row["mode"]) for row in tiny.rows}
    modes = ["plain", "fast", *(f"opacus {mode}" for mode in OPACUS_MODES)]
    expected = {(size, batch, 0, mode) for size in (28, 32, 64) for batch in (2, 4) for mode in modes}
    expected |= {(size, 2, 2, mode) for size in (28, 32, 64) for mode in ("plain", "fast")}
    expected |= {(32, 2, 0, "torch noise"), (32, 2, 0, "secure noise")}
    assert rows == expected
    assert len({tuple(row) for row in tiny.rows}) == 1
    assert all(row["rounds"] == STEPS and row["peak_mib"] > 0 for row in tiny.rows)
    print_result(tiny)
    assert "fast_over_plain_28 = " in capsys.readouterr().out


@pytest.mark.slow
def test_a_mode_that_would_need_too_much_memory_is_skipped_with_the_reason() -> None:
    result = measure(replace(TINY, limits=Limits(rounds=1, max_peak_bytes=1)))
    larger = [row for row in result.rows if row["batch"] == 4 and row["mode"] != "plain"]
    assert larger
    assert all(row["rounds"] is None and row["min_ms"] is None and "GiB" in row["note"] for row in larger)
    assert set(result.ratios) == RATIOS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # from functorch
@pytest.mark.parametrize("mode", OPACUS_MODES)
@pytest.mark.parametrize("size", [28, 64])
def test_opacus_and_the_fast_engine_take_the_same_step_without_noise(size: int, mode: str) -> None:
    ours, theirs, ordinary = (_discriminator(size) for _ in range(3))
    before = copy.deepcopy(ours)
    data = make_data(size, patients=5, fakes=0)
    for step in (
        private(ours, data, "fast", torch_noise, noise_multiplier=0.0),
        opacus(theirs, data, mode, noise_multiplier=0.0),
        plain(ordinary, data),
    ):
        step()
        step()
    moved, same, other = (_flat(model) - _flat(before) for model in (ours, theirs, ordinary))
    assert (moved - same).norm() < 1e-2 * moved.norm()
    assert (moved - other).norm() > 5e-2 * moved.norm()


def test_a_slow_mode_takes_few_turns_and_the_others_take_all() -> None:
    steps = dict.fromkeys(("plain", "other"), set_up_nothing)
    limits = Limits(rounds=SLOW_ROUNDS + 2, slow_s=0.0)
    assert {len(one.seconds) for one in take_turns(steps, limits, {}, 1).values()} == {SLOW_ROUNDS * STEPS}
    measured = take_turns(steps, replace(limits, slow_s=60.0), {}, 1)
    assert {len(one.seconds) for one in measured.values()} == {(SLOW_ROUNDS + 2) * STEPS}


def test_a_mode_that_fails_is_named() -> None:
    with pytest.raises(RuntimeError, match="'other'"):
        take_turns({"plain": set_up_nothing, "other": set_up_a_failure}, Limits(rounds=1), {}, 1)


def test_the_row_of_a_mode_whose_fastest_steps_disagree_says_so() -> None:
    settled = Measured((1.0, 1.01, 9.0, 1.02, 1.03, 9.0, 1.09), peak_bytes=1)
    unsettled = Measured((1.0, 1.01, 9.0, 1.02, 1.03, 9.0, 1.11), peak_bytes=1)
    assert figures(settled, settled)["note"] == ""
    assert figures(unsettled, settled)["note"] == "busy"
    assert figures(unsettled, settled)["time_ratio"] == 1.0


def test_peak_of_known_allocations() -> None:
    held = torch.ones(1000)

    def step() -> None:
        first = torch.empty(1_000_000, dtype=torch.uint8)
        del first
        second = torch.empty(700_000, dtype=torch.uint8)
        third = torch.empty(500_000, dtype=torch.uint8)
        del second
        fourth = torch.empty(100_000, dtype=torch.uint8)
        del third, fourth

    def in_place() -> None:
        held.mul_(held)

    assert peak_bytes(step) == 1_200_000
    assert peak_bytes(in_place) == 0


def test_peak_counts_neither_what_was_held_before_nor_its_release() -> None:
    held = [torch.empty(2_000_000, dtype=torch.uint8)]

    def step() -> None:
        held.clear()
        held.append(torch.empty(300_000, dtype=torch.uint8))

    assert peak_bytes(step) == 300_000
    assert peak_bytes(step) == 300_000  # what is released was seen when it was allocated, in the step before


def test_peak_sees_the_scratch_of_convolutions() -> None:
    convolution = torch.nn.Conv2d(32, 64, 4, stride=2, padding=1)
    images = torch.randn(16, 32, 14, 14)
    result_bytes = 16 * 64 * 7 * 7 * 4

    def step() -> None:
        with torch.no_grad():
            convolution(images)

    step()
    assert peak_bytes(step) > result_bytes


def _discriminator(size: int) -> torch.nn.Module:
    image = ImageConfig.model_validate({"size": size})
    model = build(SMALL, image, CLASSES, torch.Generator().manual_seed(3)).discriminator
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # so that gradients are long enough to be clipped, some more than others
    return model


def _flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
