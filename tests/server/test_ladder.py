import numpy as np

from common.config import TrainConfig
from server.checkpoint import State
from server.ladder import LADDER, climb, first_rung


def _state(rung: int) -> State:
    return State("run", "digest", 0, {"w": np.zeros(1)}, {"w": np.zeros(1)}, d_steps_per_g_step=rung)


def test_fixed_number_never_moves() -> None:
    train = TrainConfig(d_steps_per_g_step=3, steps_per_round=1000)
    assert first_rung(train) == 3
    assert climb(train, _state(3), 0.0) == _state(3)


def test_climbs_only_when_fakes_fool_d_for_long_enough() -> None:
    train = TrainConfig(d_steps_per_g_step="adaptive", steps_per_round=1000)
    state = _state(first_rung(train))
    assert climb(train, state, 0.9).d_steps_per_g_step == 1
    assert climb(train, state, 0.5).d_steps_per_g_step == 2


def test_few_steps_do_not_climb() -> None:
    train = TrainConfig(d_steps_per_g_step="adaptive", steps_per_round=10)
    state = _state(1)
    for _ in range(19):
        state = climb(train, state, 0.0)
        assert state.d_steps_per_g_step == 1
    assert climb(train, state, 0.0).d_steps_per_g_step == 2  # the 200th generator step on the rung


def test_rung_never_exceeds_a_round() -> None:
    train = TrainConfig(d_steps_per_g_step="adaptive", steps_per_round=10)
    state = _state(1)
    for _ in range(5000):
        state = climb(train, state, 0.0)
    assert state.d_steps_per_g_step == max(rung for rung in LADDER if rung <= 10)
