import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ServerConfig
from common.errors import FederationError
from server.aggregation import MeanState, OptimizerState, add_to_mean, average, norm, step
from server.robust import combine


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 10_000)), min_size=1, max_size=20))
def test_weighted_mean(pairs: list[tuple[float, int]]) -> None:
    state = MeanState()
    for value, weight in pairs:
        state = add_to_mean(state, {"w": np.full((2, 3), value, np.float32)}, weight)
    values, weights = zip(*[(np.float32(v), w) for v, w in pairs], strict=True)
    np.testing.assert_allclose(state.mean["w"], np.average(values, weights=weights), rtol=1e-9, atol=1e-6)


def test_identical_updates_come_back_exactly() -> None:
    update = {"w": np.random.default_rng(0).normal(size=1000).astype(np.float32)}
    state = MeanState()
    for weight in (3, 7, 11):
        state = add_to_mean(state, update, weight)
    assert (state.mean["w"].astype(np.float32) == update["w"]).all()


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_weight_must_be_positive(weight: float) -> None:
    with pytest.raises(FederationError):
        add_to_mean(MeanState(), {"w": np.zeros(1, np.float32)}, weight)


def _moves(optimizer: str, deltas: list[float], **settings_: float) -> list[float]:
    config = ServerConfig(optimizer=optimizer, **settings_)
    weights, state, path = {"w": np.zeros(1, np.float32)}, OptimizerState(), []
    for delta in deltas:
        weights, state = step(config, weights, {"w": weights["w"] + delta}, state)
        path.append(float(weights["w"][0]))
    return path


def test_sgd_by_hand() -> None:
    assert _moves("sgd", [1.0, 1.0], learning_rate=0.5) == [0.5, 1.0]


def test_momentum_by_hand() -> None:
    assert _moves("momentum", [1.0, 1.0], momentum=0.5) == [1.0, 2.5]


def test_adam_by_hand() -> None:
    # m = 0.1 d, v = 0.99 tau^2 + 0.01 d^2, step = m / (sqrt(v) + tau)
    tau = 0.1
    expected = 0.1 / (np.sqrt(0.99 * tau**2 + 0.01) + tau)
    assert _moves("adam", [1.0], adaptivity=tau)[0] == pytest.approx(expected, rel=1e-6)


def test_yogi_by_hand() -> None:
    # v = tau^2 - 0.01 d^2 sign(tau^2 - d^2) = tau^2 + 0.01 d^2
    tau = 0.1
    expected = 0.1 / (np.sqrt(tau**2 + 0.01) + tau)
    assert _moves("yogi", [1.0], adaptivity=tau)[0] == pytest.approx(expected, rel=1e-6)


def test_average_and_norm() -> None:
    assert average({"w": np.ones(1)}, {"w": np.zeros(1)}, 0.75)["w"].tolist() == [0.75]
    assert norm([np.array([3.0]), np.array([4.0])]) == 5.0


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum"])
def test_robust_rules_outvote_one_liar(rule: str) -> None:
    honest = [{"w": np.full(4, 1.0 + 0.01 * i, np.float32)} for i in range(5)]
    liar = {"w": np.full(4, 1e6, np.float32)}
    assert np.abs(combine(rule, [*honest, liar])["w"] - 1.0).max() < 0.1
    mean = MeanState()
    for update in [*honest, liar]:
        mean = add_to_mean(mean, update, 1)
    assert np.abs(mean.mean["w"] - 1.0).min() > 1e4  # the plain mean does not


def test_robust_rules_need_three() -> None:
    with pytest.raises(FederationError, match="at least 3"):
        combine("median", [{"w": np.zeros(1)}] * 2)
