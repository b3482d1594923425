"""Federations whose weights travel in 16 bits: beside the same in 32, resumed, and with sites that do otherwise."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Context

from client import journal
from client.agent import answer, open_site
from client.app import make_app
from client.channel import Transport
from client.home import Home
from common.config import Config
from common.config_text import build_config
from common.crypto import KeyStream, load_key
from common.errors import FederationError
from common.messages import Request
from common.seal import request_digest
from common.weights import for_transport
from server import checkpoint
from server.app import Job, federate
from server.checkpoint import State
from server.records import RoundRecord
from server.run_folder import open_run
from simulations.local_grid import LocalGrid
from tests.function_sites import SMALL_RUN, run_sites
from tests.tiny_site import PROPOSAL, make_home


def _fields() -> dict[str, float | int]:
    return {"epsilon_spent": 1.0, "epsilon_allowed": 10.0, "fake_accuracy": 0.5, "d_steps_per_g_step": 1}


def _release(index: int, request: Request, dtype: npt.DTypeLike) -> tuple[dict, dict]:
    moved = {name: array.astype(np.float32) + 1e-6 * (index + 1) for name, array in request.arrays.items()}
    return _fields(), {name: array.astype(dtype) for name, array in moved.items()}


def _state(run: Path) -> State:
    state = checkpoint.load_latest(run / "checkpoints")
    assert state is not None
    return state


def _federation(tmp_path: Path, transport: str) -> tuple[State, list[RoundRecord], Home]:
    """Run a federation of one real site, its secrets the same whatever the transport."""
    tmp_path.mkdir()
    home, drawn = make_home(tmp_path), list[str]()

    def secrets(digest: str) -> KeyStream:
        drawn.append(digest)
        return KeyStream(hashlib.sha256(str(len(drawn)).encode()).digest())

    site = open_site(home, secrets)

    def connect(context: Context) -> Transport:
        del context
        return lambda request: answer(site, request)

    config = build_config(
        PROPOSAL.model_dump(), {"federation.transport": transport, "warmup.steps": 20, "simulation.sites": 1}
    )
    job = Job(config, open_run(tmp_path / "run", config, resume=False))
    records = [event for event in federate(LocalGrid(make_app(connect), 1), job) if isinstance(event, RoundRecord)]
    return _state(tmp_path / "run"), records, home


@pytest.mark.slow
def test_ends_close_to_the_run_in_32_bits_for_half_the_bytes(tmp_path: Path) -> None:
    exact, exact_records, _ = _federation(tmp_path / "32", "float32")
    halved, records, home = _federation(tmp_path / "16", "float16")
    assert [record.round for record in records] == [0, 1, 2, 3]
    assert records[0].upload_bytes == exact_records[0].upload_bytes  # a sum of the warm-up is not rounded
    assert [2 * record.upload_bytes for record in records[1:]] == [one.upload_bytes for one in exact_records[1:]]
    for name, array in exact.averaged.items():
        assert halved.averaged[name].dtype == np.float32
        np.testing.assert_allclose(halved.averaged[name], array, atol=2e-3, err_msg=name)
    assert any((halved.averaged[name] != array).any() for name, array in exact.averaged.items())
    lines = journal.entries(home.journal, load_key(home.key).verify_key)
    assert [line.sha256 for line in lines] == [record.sites["st-mary"].sha256 for record in records]
    assert [line.size_bytes for line in lines] == [record.upload_bytes for record in records]


def _config(**changes: object) -> Config:
    return build_config({}, {**SMALL_RUN, "federation.transport": "float16", **changes})


def test_sites_get_rounded_weights_and_the_run_keeps_its_own(tmp_path: Path) -> None:
    """Moves of a millionth, which 16 bits do not hold beside a weight, are not swallowed by the coordinator."""
    asked: dict[int, Mapping[str, np.ndarray]] = {}

    def look(request: Request) -> type:
        asked[request.round] = request.arrays
        return np.float16

    run_sites(tmp_path, _config(), [look] * 3, _release)
    state = _state(tmp_path / "run")
    assert {array.dtype for arrays in asked.values() for array in arrays.values()} == {np.dtype(np.float16)}
    assert {array.dtype for array in state.weights.values()} == {np.dtype(np.float32)}
    sent = for_transport(state.weights, "float16")
    assert any((state.weights[name] != array).any() for name, array in sent.items())


@pytest.mark.slow
def test_a_resumed_run_asks_what_the_whole_one_asked(tmp_path: Path) -> None:
    asked: dict[str, list[str]] = {"whole": [], "parts": []}

    def look(of: str, until: int) -> Callable[[Request], type]:
        def note(request: Request) -> type:
            asked[of].append(request_digest(request))
            return np.float16 if request.round <= until else np.float64  # what is refused: the run ends there

        return note

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_sites(whole, _config(), [look("whole", 3)], _release)
    with pytest.raises(FederationError):
        run_sites(parts, _config(), [look("parts", 2)], _release)
    run_sites(parts, _config(**{"run.resume": True}), [look("parts", 3)], _release)
    assert sorted(set(asked["parts"])) == sorted(set(asked["whole"]))
    left, right = _state(whole / "run"), _state(parts / "run")
    assert all((left.weights[name] == array).all() for name, array in right.weights.items())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_a_release_in_other_numbers_is_malformed(tmp_path: Path, dtype: npt.DTypeLike) -> None:
    config = _config(**{"federation.rounds": 1})
    records = run_sites(tmp_path, config, [lambda _: np.float16, lambda _: dtype, lambda _: np.float16], _release)
    assert records[1].refused == {"site-1": "malformed-reply"}
    assert set(records[1].sites) == {"site-0", "site-2"}


def test_halves_in_a_run_of_32_bits_are_malformed(tmp_path: Path) -> None:
    config = _config(**{"federation.rounds": 1, "federation.transport": "float32"})
    records = run_sites(tmp_path, config, [lambda _: np.float32, lambda _: np.float16, lambda _: np.float32], _release)
    assert records[1].refused == {"site-1": "malformed-reply"}


@pytest.mark.parametrize("rule", ["median", "krum"])
def test_robust_rules_do_not_overflow(tmp_path: Path, rule: str) -> None:
    """Distances between updates in 16 bits would be infinite."""
    changes = {"federation.rounds": 1, "server.aggregation": rule, "simulation.sites": 5, "federation.min_sites": 5}

    def release(index: int, request: Request, _: object) -> tuple[dict, dict]:
        far = {name: np.full_like(array, 60_000.0 if index == 4 else 0.5) for name, array in request.arrays.items()}
        return _fields(), far

    run_sites(tmp_path, _config(**changes), [lambda request: None] * 5, release)
    for array in _state(tmp_path / "run").weights.values():
        np.testing.assert_allclose(array, 0.5, atol=1e-3)
