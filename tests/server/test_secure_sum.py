"""One step of all sites together at the coordinator: the sum, the fakes, Adam over a resume, and who may be missing."""

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.config import Config
from common.config_text import build_config
from common.errors import ConfigError, FederationError, RefusalCode
from common.losses import WEIGHT_BOUND
from common.messages import Kind, Request, Scalar
from common.secure_sum import GRID
from common.weights import get_weights
from server import checkpoint
from server.checkpoint import State
from server.records import RoundRecord
from server.rounds import initial_pair
from server.secure_sum import clipped_sum_of_fakes, step_together
from tests.function_sites import SMALL_RUN, run_sites

Answer = Callable[[Request], RefusalCode | np.ndarray]


def _config(**changes: object) -> Config:
    own = {
        "train.algorithm": "secure-sum",
        "train.steps_per_round": 1,
        "train.d_steps_per_g_step": 2,
        "train.generator_batch": 4,
        "privacy.batch_patients": 8,
        "privacy.max_grad_norm": 0.5,
        "performance.threads": 1,
    }
    return build_config({}, {**SMALL_RUN, **own, **changes})


def _start(config: Config) -> State:
    weights = get_weights(initial_pair(config))
    return State("run", config.digest(), 0, weights, weights, d_steps_per_g_step=2, cohort={"a": 100, "b": 100})


def _numbers(state: State) -> int:
    return sum(array.size for name, array in state.weights.items() if name.startswith("discriminator."))


def _moved(before: State, after: State) -> set[str]:
    return {name for name, array in after.weights.items() if not np.array_equal(array, before.weights[name])}


def _same(left: State, right: State) -> bool:
    pairs = [(left.weights, right.weights), (left.averaged, right.averaged)]
    pairs += [(left.optimizer.first, right.optimizer.first), (left.optimizer.second, right.optimizer.second)]
    return all(a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a) for a, b in pairs)


@pytest.mark.parametrize("name", ["mlp", "dcgan"])
def test_fakes_are_clipped_one_by_one(name: str) -> None:
    config = _config(**{"model.name": name})
    discriminator = initial_pair(config).discriminator
    parameters = list(discriminator.parameters())
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(40) % 2
    norms, expected = [], 0.0
    for image, label in zip(images, labels, strict=True):
        loss = F.softplus(discriminator(image[None], label[None])).sum()
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]).double()
        norms.append(float(gradient.norm()))
        expected = expected + gradient * min(1.0, 0.8 * norms[0] / norms[-1])
    made = clipped_sum_of_fakes(discriminator, images, labels, F.softplus, 0.8 * norms[0])
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    assert made.norm() < 40 * 0.8 * norms[0]


def test_a_fake_whose_gradient_is_not_finite_counts_as_zero() -> None:
    discriminator = initial_pair(_config()).discriminator
    images, labels = torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64)
    alone = clipped_sum_of_fakes(discriminator, images[:1], labels[:1], F.softplus, 0.5)
    images[1] = torch.inf
    torch.testing.assert_close(clipped_sum_of_fakes(discriminator, images, labels, F.softplus, 0.5), alone)


def test_first_step_goes_against_the_gradient_of_sum_and_fakes() -> None:
    """Adam's first step is the sign of the gradient: a sum that outweighs the fakes decides it in every coordinate."""
    config = _config(**{"train.learning_rate_d": 1e-3})
    state = _start(config)
    large = np.random.default_rng(0).choice([-1, 1], _numbers(state)) * (2**16 * 100)
    after, told = step_together(config, state, large, 8.0)
    change = np.concatenate(
        [(after.weights[n] - state.weights[n]).ravel() for n in state.weights if n.startswith("discriminator.")]
    )
    np.testing.assert_allclose(change, -1e-3 * np.sign(large), rtol=1e-2)
    assert 0.0 <= told <= 1.0


def test_public_divisor_and_grid_make_the_gradient() -> None:
    """Without momentum to hide it: the first moment of Adam after one step is half the gradient: 1 - beta1."""
    config = _config()
    state = _start(config)
    zero, one = np.zeros(_numbers(state), np.int64), np.zeros(_numbers(state), np.int64)
    one[0] = 3000
    name = next(name for name in state.weights if name.startswith("discriminator."))
    moments = [step_together(config, state, total, 8.0)[0].optimizer.first[name] for total in (zero, one)]
    difference = (moments[1] - moments[0]).ravel()
    assert difference[0] == pytest.approx(0.5 * 3000 * GRID * 0.5 / 16, rel=1e-4)
    assert np.abs(difference[1:]).max() == 0.0


def test_wasserstein_changes_the_fakes_part_and_bounds_the_weights() -> None:
    free = {"privacy.max_grad_norm": 100.0}  # clipped, both losses have the same direction
    config = _config(**{"train.loss": "wasserstein"}, **free)
    state = _start(config)
    after, _ = step_together(config, state, np.zeros(_numbers(state), np.int64), 8.0)
    trained = np.concatenate([after.weights[n].ravel() for n in after.weights if n.startswith("discriminator.")])
    assert np.abs(trained).max() == WEIGHT_BOUND
    logistic = step_together(_config(**free), state, np.zeros(_numbers(state), np.int64), 8.0)[0]
    ratio = after.optimizer.first["discriminator.last.bias"] / logistic.optimizer.first["discriminator.last.bias"]
    assert ratio == pytest.approx(2.0, rel=0.1)  # where D is unsure, the logistic loss has half the slope


def test_a_private_autoencoder_meets_no_fakes_and_gives_its_decoder_away() -> None:
    config = _config(**{"model.name": "vae", "model.latent_dim": 14, "train.ema_decay": 0.0})
    states = [_start(config)]
    for number in range(4):
        total = np.random.default_rng(number).integers(-(2**16), 2**16, _numbers(states[0]))
        after, told = step_together(config, states[-1], total, 8.0)
        assert told is None
        expected = total * (GRID * 0.5 * 0.5 / 16)  # beta1, the clipping norm and the divisor: nothing else was added
        first = np.concatenate([array.ravel() for array in after.optimizer.first.values()])
        before = np.concatenate([array.ravel() for array in states[-1].optimizer.first.values()]) if number else 0.0
        np.testing.assert_allclose(first - 0.5 * before, expected, atol=1e-6)
        states.append(after)
    for state in states[1:]:
        same = [
            np.array_equal(state.weights[n.replace("discriminator.decoder", "generator")], array)
            for n, array in state.weights.items()
            if n.startswith("discriminator.decoder.")
        ]
        assert all(same) == (state.round % 2 == 0)
        for name, array in state.weights.items():
            assert np.array_equal(array, state.averaged[name])


def test_g_and_its_average_move_when_it_is_their_turn() -> None:
    config = _config()
    states = [_start(config)]
    for _ in range(4):
        zero = np.zeros(_numbers(states[-1]), np.int64)
        states.append(step_together(config, states[-1], zero, 8.0)[0])
    generators = [any(name.startswith("generator.") for name in _moved(*pair)) for pair in pairwise(states)]
    assert generators == [False, True, False, True]
    for state in states[1:]:
        for name in state.weights:
            same = np.array_equal(state.averaged[name], state.weights[name])
            assert same == (name.startswith("discriminator.") or state.round < 2)


def test_deterministic_over_a_checkpoint(tmp_path: Path) -> None:
    config = _config()
    state = kept = _start(config)
    rng = np.random.default_rng(0)
    for _ in range(5):
        total = rng.integers(-(2**20), 2**20, _numbers(state))
        state, _ = step_together(config, state, total, 8.0)
        checkpoint.save(tmp_path, kept)
        loaded = checkpoint.load_latest(tmp_path)
        assert loaded is not None
        kept, _ = step_together(config, loaded, total, 8.0)
        assert _same(state, kept)
        assert kept.cohort == {"a": 100, "b": 100}
    assert not _same(
        state, step_together(config, replace(state, round=7), total, 8.0)[0]
    )  # the fakes are a round's own


def _release(index: int, request: Request, answer: np.ndarray) -> tuple[dict[str, Scalar], dict[str, np.ndarray]]:
    return {"epsilon_spent": 1.0, "epsilon_allowed": 10.0}, {"gradient": answer}


def _run(tmp_path: Path, config: Config, behaviours: list[Answer]) -> list[RoundRecord]:
    return run_sites(tmp_path, config, behaviours, _release)


def _well(request: Request) -> np.ndarray:
    return np.zeros(sum(array.size for array in request.arrays.values()), np.int32)


def _gone(round_: int, request: Request) -> RefusalCode | np.ndarray:
    return RefusalCode.UNREACHABLE if request.round >= round_ else _well(request)


def test_sites_get_the_discriminator_and_the_cohort_and_nothing_else(tmp_path: Path) -> None:
    seen: list[Request] = []

    def note(request: Request) -> np.ndarray:
        seen.append(request)
        return _well(request)

    records = _run(tmp_path, _config(), [note, _well, _well])
    assert [record.round for record in records] == [0, 1, 2, 3]
    assert [request.kind for request in seen] == [Kind.GRADIENT] * 3
    assert all(request.settings == {"cohort_sites": 3, "cohort_patients": 600} for request in seen)
    assert all(name.startswith("discriminator.") for request in seen for name in request.arrays)
    release = records[1].sites["site-1"]
    assert (release.sample_rate, release.steps) == (8 / 600, 1)


def test_missing_sites_change_neither_cohort_nor_divisor(tmp_path: Path) -> None:
    behaviours: list[Answer] = [_well, functools.partial(_gone, 2), _well]
    records = _run(tmp_path, _config(), behaviours)
    assert [len(record.sites) for record in records[1:]] == [3, 2, 2]
    assert {release.sample_rate for record in records[1:] for release in record.sites.values()} == {8 / 600}
    assert records[2].refused == {"site-1": "unreachable"}


@pytest.mark.slow
def test_with_too_many_missing_the_round_changes_nothing(tmp_path: Path) -> None:
    behaviours: list[Answer] = [_well, functools.partial(_gone, 2), functools.partial(_gone, 3)]
    with pytest.raises(FederationError, match=r"Round 3 heard 1 sites in 3 attempts.*colluding_sites=1 may be missing"):
        _run(tmp_path, _config(**{"privacy.colluding_sites": 1}), behaviours)
    state = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert state.round == 2


def test_a_share_of_another_form_is_no_part_of_the_sum(tmp_path: Path) -> None:
    behaviours: list[Answer] = [_well, lambda r: _well(r)[:-1], lambda r: _well(r).astype(np.float32)]
    records = _run(tmp_path, _config(**{"federation.rounds": 1}), behaviours)
    assert set(records[1].sites) == {"site-0"}
    assert records[1].refused == {"site-1": "malformed-reply", "site-2": "malformed-reply"}


def test_sites_below_the_least_size_are_not_counted(tmp_path: Path) -> None:
    records = _run(tmp_path, _config(**{"privacy.min_patients": 150, "federation.rounds": 1}), [_well] * 3)
    assert set(records[1].sites) == {"site-1", "site-2"}
    assert records[1].sites["site-2"].sample_rate == 8 / 500
    with pytest.raises(FederationError, match="No site declares"):
        _run(tmp_path / "other", _config(**{"privacy.min_patients": 350}), [_well] * 3)


def test_more_colluding_sites_than_there_are_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="below the number of sites, 3"):
        _run(tmp_path, _config(**{"privacy.colluding_sites": 3}), [_well] * 3)
