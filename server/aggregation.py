"""Combining updates and stepping the global weights: pure functions over named arrays. No network, no torch.

Robust rules stand in server/robust. Out of scope: who is asked and what is checked (server/app).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import numpy.typing as npt

from common.config import ServerConfig
from common.errors import FederationError
from common.messages import Arrays

NamedArrays = dict[str, npt.NDArray[Any]]


@final
@dataclass(frozen=True)
class MeanState:
    """A running weighted mean: constant memory in the number of sites."""

    total_weight: float = 0.0
    mean: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict[str, npt.NDArray[Any]])


def add_to_mean(state: MeanState, update: Arrays, weight: float) -> MeanState:
    """Add one update to a running mean.

    Args:
        state: The mean so far.
        update: Named arrays; the same names and shapes each time.
        weight: Public and positive: a declared cohort size, or 1.

    Guarantees:
        - weighted_mean: After all updates the mean is the sum of weight times update over the sum of weights.
    """
    if not weight > 0:
        raise FederationError(f"Expected weight={weight} above 0. Declare a positive number of patients.")
    total = state.total_weight + weight
    share = weight / total
    if not state.mean:
        return MeanState(total, {name: np.asarray(array, np.float64) for name, array in update.items()})
    mean = {name: old + share * (np.asarray(update[name], np.float64) - old) for name, old in state.mean.items()}
    return MeanState(total, mean)


@final
@dataclass(frozen=True)
class OptimizerState:
    """First and second moments of the server optimiser; empty before the first step."""

    first: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict[str, npt.NDArray[Any]])
    second: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict[str, npt.NDArray[Any]])


def step(
    config: ServerConfig, weights: Arrays, combined: Arrays, state: OptimizerState
) -> tuple[NamedArrays, OptimizerState]:
    """Move the global weights towards the combined ones.

    Args:
        config: Which optimiser, its rates.
        weights: The global weights before the round.
        combined: What the sites' weights combine to.
        state: Moments of the rounds before.

    Returns:
        The new weights in float32, and the new moments.

    Source: Reddi et al. 2021 (arXiv 2003.00295), algorithm 2, without bias correction; momentum as in Hsu et al. 2019.
    """
    delta = {name: np.asarray(combined[name], np.float64) - weights[name] for name in weights}
    if config.optimizer == "sgd":
        return _moved(config, weights, delta), state
    b1 = config.momentum
    if config.optimizer == "momentum":
        first = {name: b1 * _or_zero(state.first, name, delta) + change for name, change in delta.items()}
        return _moved(config, weights, first), OptimizerState(first)
    first = {name: b1 * _or_zero(state.first, name, delta) + (1 - b1) * change for name, change in delta.items()}
    second = {name: _second_moment(config, state, name, change) for name, change in delta.items()}
    change = {name: first[name] / (np.sqrt(second[name]) + config.adaptivity) for name in delta}
    return _moved(config, weights, change), OptimizerState(first, second)


def average(old: Arrays, new: Arrays, decay: float) -> NamedArrays:
    """Return the exponential moving average of weights over rounds, in float32."""
    return {name: (decay * old[name] + (1 - decay) * np.asarray(new[name])).astype(np.float32) for name in new}


def norm(arrays: Iterable[npt.NDArray[Any]]) -> float:
    """Return the L2 norm of all arrays together."""
    return float(np.sqrt(sum(float(np.square(np.asarray(array, np.float64)).sum()) for array in arrays)))


def _second_moment(config: ServerConfig, state: OptimizerState, name: str, change: Any) -> npt.NDArray[Any]:
    square = np.square(change)
    old = np.asarray(state.second[name]) if name in state.second else np.full_like(square, config.adaptivity**2)
    b2 = config.second_momentum
    if config.optimizer == "adam":
        return b2 * old + (1 - b2) * square
    return old - (1 - b2) * square * np.sign(old - square)  # yogi


def _moved(config: ServerConfig, weights: Arrays, change: Arrays) -> NamedArrays:
    return {name: (weights[name] + config.learning_rate * change[name]).astype(np.float32) for name in weights}


def _or_zero(moments: Arrays, name: str, like: Arrays) -> npt.NDArray[Any]:
    return np.asarray(moments[name]) if name in moments else np.zeros_like(like[name])
