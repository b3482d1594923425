"""The round loop over a grid in this process, with sites that are functions: late, out of budget, gone, lying."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.app import make_app
from common.config import Config
from common.config_text import build_config
from common.crypto import SigningKey
from common.errors import FederationError, PolicyRefusal, RefusalCode, StorageError
from common.features import feature_dim, feature_map
from common.lock import alone
from common.messages import Kind, Request, Scalar
from common.seal import Trust
from common.weights import get_weights
from server import app, checkpoint
from server.records import Failed, RoundRecord, Waiting, read_records
from server.registered import Registered
from server.rounds import initial_pair, round_bytes
from server.run_folder import open_run
from simulations.local_grid import LocalGrid
from tests.function_sites import SMALL_RUN, follow_sites, run_sites

Behaviour = Callable[[Request], RefusalCode | dict[str, np.ndarray] | None]


def _config(**changes: object) -> Config:
    return build_config({}, {**SMALL_RUN, **changes})


def _release(
    index: int, request: Request, answer: dict[str, np.ndarray] | None
) -> tuple[dict[str, Scalar], dict[str, np.ndarray]]:
    arrays = answer if answer is not None else {name: array + index for name, array in request.arrays.items()}
    return {"epsilon_spent": 1.0, "epsilon_allowed": 10.0, "fake_accuracy": 0.5, "d_steps_per_g_step": 1}, arrays


def _run(tmp_path: Path, config: Config, behaviours: list[Behaviour]) -> list[RoundRecord]:
    return run_sites(tmp_path, config, behaviours, _release)


def _well(request: Request) -> None:
    return None


def _refuse(code: RefusalCode, round_: int, request: Request) -> RefusalCode | None:
    return code if request.round >= round_ else None


def test_declared_sizes_weigh_the_mean(tmp_path: Path) -> None:
    config = _config(**{"federation.rounds": 1})
    _run(tmp_path, config, [_well] * 3)
    state = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    before = get_weights(initial_pair(config))
    for name, array in state.weights.items():  # sites add 0, 1, 2 and weigh 100, 200, 300
        np.testing.assert_allclose(array, before[name] + 8 / 6, atol=1e-5)


def test_refusal_costs_the_round_its_contribution_only(tmp_path: Path) -> None:
    out = functools.partial(_refuse, RefusalCode.OVER_BUDGET, 2)
    records = _run(tmp_path, _config(), [_well, out, _well])
    assert [record.round for record in records] == [0, 1, 2, 3]
    assert set(records[1].sites) == {"site-0", "site-1", "site-2"}
    assert set(records[2].sites) == {"site-0", "site-2"}
    assert records[3].refused == {"site-1": "over-budget"}


def test_when_no_site_can_go_on_the_run_ends_well(tmp_path: Path) -> None:
    out = functools.partial(_refuse, RefusalCode.OVER_BUDGET, 3)
    records = _run(tmp_path, _config(), [out, out, out])
    assert [record.round for record in records] == [0, 1, 2]
    state = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert state.round == 2


@pytest.mark.parametrize(
    ("spent", "allowed"),
    [(1e308, 5e-324), (1e308, 1.7e308), (10.1, 10.0), (1.0, 1e7), (-1.0, 10.0), (math.nan, 10.0), (1.0, math.inf)],
)
def test_an_epsilon_that_cannot_be_costs_the_site_its_round(tmp_path: Path, spent: float, allowed: float) -> None:
    """What a site declares is stated as the federation's: in status, report and privacy.json."""

    def declares(index: int, request: Request, answer: Any) -> tuple[dict[str, Scalar], dict[str, np.ndarray]]:
        fields, arrays = _release(index, request, answer)
        return fields | ({"epsilon_spent": spent, "epsilon_allowed": allowed} if index == 1 else {}), arrays

    records = run_sites(tmp_path, _config(**{"federation.rounds": 1}), [_well] * 3, declares)
    assert records[-1].refused == {"site-1": "malformed-reply"}


def test_an_epsilon_at_its_bound_counts_though_it_is_rounded(tmp_path: Path) -> None:
    def declares(index: int, request: Request, answer: Any) -> tuple[dict[str, Scalar], dict[str, np.ndarray]]:
        fields, arrays = _release(index, request, answer)
        return fields | {"epsilon_spent": math.nextafter(10.0, 11.0)}, arrays

    records = run_sites(tmp_path, _config(**{"federation.rounds": 1}), [_well] * 3, declares)
    assert records[-1].refused == {}


def test_malformed_arrays_cost_the_site_its_round(tmp_path: Path) -> None:
    def lie(request: Request) -> dict[str, np.ndarray]:
        return {"generator.w": np.zeros(3, np.float32)}

    def nan(request: Request) -> dict[str, np.ndarray]:
        return {name: np.full_like(array, np.nan) for name, array in request.arrays.items()}

    records = _run(tmp_path, _config(**{"federation.rounds": 1}), [_well, lie, nan])
    assert set(records[1].sites) == {"site-0"}
    assert records[1].refused == {"site-1": "malformed-reply", "site-2": "malformed-reply"}


def test_exception_at_a_site_is_a_code(tmp_path: Path) -> None:
    def crash(request: Request) -> None:
        raise RuntimeError("patient 17")

    records = _run(tmp_path, _config(**{"federation.rounds": 1}), [_well, crash, _well])
    assert records[1].refused == {"site-1": "internal-error"}
    assert "patient 17" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_nobody_heard_in_three_attempts_says_what_to_do(tmp_path: Path) -> None:
    gone = functools.partial(_refuse, RefusalCode.UNREACHABLE, 2)
    with pytest.raises(FederationError, match=r"Round 2 heard 0 sites in 3 attempts.*resume the run"):
        _run(tmp_path, _config(), [gone, gone, gone])
    assert [record.round for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


@pytest.mark.slow
def test_site_that_comes_back_is_heard_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def away_once(request: Request) -> RefusalCode | None:
        asked.append(request.round)
        return RefusalCode.UNREACHABLE if asked.count(request.round) == 1 and request.round == 2 else None

    config = _config(**{"federation.min_sites": 3})
    records = _run(tmp_path, config, [_well, away_once, _well])
    assert [record.round for record in records] == [0, 1, 2, 3]
    assert asked == [1, 2, 2, 3]


def test_too_few_connected_is_an_error(tmp_path: Path) -> None:
    config = _config(**{"federation.min_sites": 3, "federation.connect_timeout_s": 0.2})
    with pytest.raises(FederationError, match="min_sites=3"):
        _run(tmp_path, config, [_well, _well])


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum"])
def test_robust_rules_outvote_a_poisoned_update(tmp_path: Path, rule: str) -> None:
    def poison(request: Request) -> dict[str, np.ndarray]:
        return {name: np.full_like(array, 1e6) for name, array in request.arrays.items()}

    changes = {"federation.rounds": 1, "server.aggregation": rule, "simulation.sites": 5, "federation.min_sites": 5}
    _run(tmp_path, _config(**changes), [_well, _well, _well, _well, poison])
    state = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert max(float(np.abs(array).max()) for array in state.weights.values()) < 100


def test_warm_up_sums_what_the_sites_release(tmp_path: Path) -> None:
    dim = feature_dim(feature_map(28))

    def release(request: Request) -> dict[str, np.ndarray] | None:
        if request.kind is not Kind.WARMUP:
            return None
        sums = np.zeros((2, dim), np.float32)
        sums[:, 0] = 20.0
        return {"embedding": sums}

    changes = {"warmup.share": 0.5, "warmup.steps": 2, "warmup.batch_size": 8, "federation.rounds": 0}
    records = _run(tmp_path, _config(**changes), [release] * 3)
    assert [record.round for record in records] == [0]
    assert records[0].upload_bytes == 3 * 2 * dim * 4


def test_a_run_waits_for_sites_that_are_all_away_for_a_while(tmp_path: Path) -> None:
    asked: list[int] = []
    looks = iter([True] * 10)  # after the first round nobody is there, for ten looks

    def away() -> bool:
        return bool(asked) and next(looks, False)

    config = _config(**{"federation.connect_timeout_s": 30.0})
    records = run_sites(tmp_path, config, [lambda request: asked.append(request.round)] * 3, _release, away)
    assert [record.round for record in records] == [0, 1, 2, 3]
    assert next(looks, None) is None  # they were looked for that often


def test_a_run_says_for_whom_it_waits(tmp_path: Path) -> None:
    looks = iter([True] * 3)
    config = _config(**{"federation.rounds": 1})
    events = list(follow_sites(tmp_path, config, [_well] * 3, _release, lambda: next(looks, False), signed=True))
    waiting, *others = [event for event in events if isinstance(event, Waiting)]
    assert (waiting.here, waiting.expected, waiting.needed) == (0, 3, 1)
    assert waiting.missing == ("site-0", "site-1", "site-2")
    assert others == []  # said once, not at each look


def test_a_run_that_ends_for_want_of_sites_names_them(tmp_path: Path) -> None:
    config = _config(**{"federation.connect_timeout_s": 0.3})
    with pytest.raises(FederationError, match=r"Not heard: site-0, site-1, site-2\. Start the sites"):
        list(follow_sites(tmp_path, config, [_well] * 3, _release, lambda: True, signed=True))


def test_an_attempt_in_vain_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "RETRY_AFTER_S", 0.0)
    asked: list[int] = []

    def once_not_finite(request: Request) -> dict[str, np.ndarray] | None:
        asked.append(request.round)
        return {name: np.full_like(array, np.nan) for name, array in request.arrays.items()} if asked == [1] else None

    config = _config(**{"federation.min_sites": 3, "federation.rounds": 1})
    events = list(follow_sites(tmp_path, config, [_well, once_not_finite, _well], _release, signed=True))
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert (failed.attempt, failed.of, failed.needed) == (1, 3, 3)
    assert failed.record.refused == {"site-1": "malformed-reply"}
    assert [record.round for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def test_a_resumed_run_waits_for_answers_as_the_one_before_did(tmp_path: Path) -> None:
    longest_s = 600.0
    config = _config(**{"federation.rounds": 5, "federation.round_timeout_s": longest_s})
    for event in follow_sites(tmp_path, config, [_well] * 3, _release, signed=True):
        if isinstance(event, RoundRecord) and event.round == 3:
            break  # as a crash would
    resumed = build_config(config.model_dump(), {"run.resume": True})
    list(follow_sites(tmp_path, resumed, [_well] * 3, _release, signed=True))
    waited = [record.deadline_s for record in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert waited[1:3] == [longest_s, longest_s]
    assert all(20 <= seconds < longest_s for seconds in waited[3:])


def test_within_one_machine_every_round_waits_as_long_as_the_run_states(tmp_path: Path) -> None:
    records = _run(tmp_path, _config(**{"federation.rounds": 4, "federation.round_timeout_s": 600.0}), [_well] * 3)
    assert [record.deadline_s for record in records[1:]] == [600.0] * 4


def test_bytes_of_a_round_are_counted_both_ways(tmp_path: Path) -> None:
    out = functools.partial(_refuse, RefusalCode.OVER_BUDGET, 1)
    config = _config(**{"federation.rounds": 1})
    record = _run(tmp_path, config, [_well, out, _well])[1]
    assert record.bytes_a_site == (round_bytes(config), round_bytes(config))
    assert (record.asked, record.download_bytes, record.upload_bytes) == (
        3,
        3 * round_bytes(config),
        2 * round_bytes(config),
    )


def test_a_run_ends_when_nobody_comes_back(tmp_path: Path) -> None:
    asked: list[int] = []
    config = _config(**{"federation.connect_timeout_s": 1.0})
    with pytest.raises(FederationError, match="min_sites=1 sites within 1 s, 0 connected"):
        run_sites(tmp_path, config, [lambda request: asked.append(request.round)] * 3, _release, lambda: bool(asked))
    state = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert state.round == 1


def test_a_run_that_every_site_refuses_ends_after_its_greeting(tmp_path: Path) -> None:
    """Nothing but a hello was asked, so nothing can have been charged; the handshake stands in the run folder."""
    asked: list[int] = []
    refusing = {"verdict": "over-budget", "rounds_allowed": 0}
    with pytest.raises(PolicyRefusal, match=r"Every site refuses this run for good \(site-0: over-budget"):
        run_sites(tmp_path, _config(), [lambda request: asked.append(request.round)] * 3, _release, says=refusing)
    assert asked == []
    kept = json.loads((tmp_path / "run" / "handshake.json").read_text())
    assert {name: said["verdict"] for name, said in kept["sites"].items()} == dict.fromkeys(
        ("site-0", "site-1", "site-2"), "over-budget"
    )


def test_a_folder_that_a_run_is_at_work_on_is_left_alone(tmp_path: Path) -> None:
    """Between machines: `resume` of a run that still runs must not write between its rounds."""
    config = _config(**{"federation.rounds": 1})
    folder = open_run(tmp_path / "run", config, resume=False)
    now = Registered(Trust(SigningKey.generate(), {}), {})
    job = app.Job(config, folder, registered=lambda: now)
    with alone(folder.path / "run.lock", "run"), pytest.raises(StorageError, match="at work there already"):
        app.run(LocalGrid(make_app(lambda _: lambda _: None), 0), job)
    assert not folder.metrics.exists()
