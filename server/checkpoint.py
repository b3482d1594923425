"""Checkpoints of the round loop: one safetensors file a round, written whole or not at all, versioned, no pickle."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from common.errors import ResumeError, StorageError
from common.files import make_folder, write_atomic
from server.aggregation import OptimizerState

VERSION = 2
KEPT = 3
_NAME = re.compile(r"round-(\d{6})\.safetensors")


@final
@dataclass(frozen=True)
class WarmupRelease:
    """The sum of one release of the warm-up, and what was summed.

    Attributes:
        look: `public`, or the sight of a lens.
        noise_std: Standard deviation of the noise in each coordinate of the sum; public.
        arrays: The noisy sum as "sum", and the lens's arrays.
    """

    look: str
    noise_std: float
    arrays: Mapping[str, npt.NDArray[Any]]


@final
@dataclass(frozen=True)
class State:
    """Everything that the next round depends on.

    Attributes:
        run_id: The run, as the sites know it.
        digest: Digest of the proposal.
        round: The last finished round; 0 after the warm-up.
        weights: Global weights of both networks.
        averaged: Their moving average over rounds; its generator is the result.
        optimizer: Moments of the server optimiser; with secure-sum of the Adams of both networks.
        d_steps_per_g_step: The rung of the ladder, or the fixed number.
        fake_accuracy: Moving average that the ladder reads.
        g_steps_on_rung: Generator steps since the last change of rung.
        cohort: With secure-sum the sites of the run with their declared patients, fixed before the first release.
        warmup: The releases up to now, while more of them are to come.
    """

    run_id: str
    digest: str
    round: int
    weights: Mapping[str, npt.NDArray[Any]]
    averaged: Mapping[str, npt.NDArray[Any]]
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    d_steps_per_g_step: int = 1
    fake_accuracy: float = 1.0
    g_steps_on_rung: int = 0
    cohort: Mapping[str, int] = field(default_factory=dict[str, int])
    warmup: tuple[WarmupRelease, ...] = ()


def save(folder: Path, state: State) -> None:
    """Write a checkpoint and drop those before the last three.

    Raises:
        StorageError: The disk is full or the folder not writable; the checkpoints before it stand.
    """
    make_folder(folder)
    header = {
        "version": VERSION,
        "run_id": state.run_id,
        "digest": state.digest,
        "round": state.round,
        "d_steps_per_g_step": state.d_steps_per_g_step,
        "fake_accuracy": state.fake_accuracy,
        "g_steps_on_rung": state.g_steps_on_rung,
        "cohort": dict(state.cohort),
        "warmup": [[release.look, release.noise_std] for release in state.warmup],
    }
    groups = {"weights": state.weights, "averaged": state.averaged}
    groups |= {"first": state.optimizer.first, "second": state.optimizer.second}
    groups |= {f"release-{number}": release.arrays for number, release in enumerate(state.warmup)}
    tensors = {
        f"{group}/{name}": np.ascontiguousarray(a) for group, arrays in groups.items() for name, a in arrays.items()
    }
    content = save_tensors(tensors, metadata={"fedmedgan-checkpoint": json.dumps(header)})
    write_atomic(folder / f"round-{state.round:06d}.safetensors", content)
    for path in _paths(folder)[:-KEPT]:
        path.unlink()


def load_latest(folder: Path) -> State | None:
    """Load the newest whole checkpoint, or None where there is none at all.

    Raises:
        ResumeError: It is of another version.
        StorageError: One cannot be read, or each is damaged.

    Guarantees:
        - the_newest_whole_one_is_loaded: Damaged ones after it are stepped over; `stepped_over` names them.
    """
    return _newest_whole(folder)[0]


def stepped_over(folder: Path) -> list[str]:
    """Say, in a line each, which checkpoints are damaged and newer than the one that `load_latest` returns.

    Raises:
        ResumeError: As `load_latest`.
        StorageError: As `load_latest`.
    """
    state, damaged = _newest_whole(folder)
    return [
        f"{path.name} is damaged: going on from round {state.round}, the newest whole checkpoint"
        for path in damaged
        if state is not None
    ]


def _newest_whole(folder: Path) -> tuple[State | None, list[Path]]:
    damaged: list[Path] = []
    for path in reversed(_paths(folder)):
        if (state := _load(path)) is not None:
            return state, damaged
        damaged.append(path)
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise StorageError(
            f"No checkpoint in {folder} is whole (damaged: {names}). Restore one from a backup, or start a new run."
        )
    return None, []


def _load(path: Path) -> State | None:
    """Read one checkpoint; None where it is damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"Could not read {path}: {error.strerror}. Mend the disk or its permissions; or delete it, to go on from "
            "an older one."
        ) from error
    try:
        tensors = load_tensors(content)
        header_bytes = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + header_bytes])["__metadata__"]["fedmedgan-checkpoint"])
        version, warmup = header.pop("version"), header.pop("warmup", [])
    except (ValueError, KeyError, SafetensorError):
        return None
    if version != VERSION:
        raise ResumeError(
            f"Expected a checkpoint of version {VERSION}, got {version}. Resume with the release that wrote it."
        )
    names = ["weights", "averaged", "first", "second", *(f"release-{number}" for number in range(len(warmup)))]
    groups: dict[str, dict[str, npt.NDArray[Any]]] = {name: {} for name in names}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        groups[group][name] = tensor
    optimizer = OptimizerState(groups["first"], groups["second"])
    releases = tuple(
        WarmupRelease(str(look), float(noise_std), groups[f"release-{number}"])
        for number, (look, noise_std) in enumerate(warmup)
    )
    return State(weights=groups["weights"], averaged=groups["averaged"], optimizer=optimizer, warmup=releases, **header)


def _paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("round-*.safetensors") if _NAME.fullmatch(path.name))
