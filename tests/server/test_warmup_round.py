"""Rounds of the warm-up: where they look, what they keep, and that a resumed run ends with the same bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context
from PIL import Image

from client.app import make_app
from common.config import Config
from common.config_text import build_config
from common.errors import ConfigError, FederationError, PolicyRefusal, RefusalCode
from common.features import CONSTANT
from common.look import look_dims
from common.messages import Kind, Request
from common.plan import plan
from common.secure_sum import WARMUP_GRID, Cohort
from common.weights import get_weights
from server import app, checkpoint
from server.exchange import Link
from server.lens import choose, outlook
from server.records import RoundRecord, read_records
from server.report import fit_sheets
from server.results import write_class_sheets
from server.roster import Member
from server.rounds import initial_pair
from server.run_folder import RunFolder
from server.start import Beginning, write_start
from server.warmup_round import warm_up
from simulations.local_grid import LocalGrid
from tests.function_sites import SMALL_RUN, Says, follow_sites, greeting, run_sites


def make_config(**changes: object) -> Config:
    own = {
        "warmup.share": 0.5,
        "warmup.refinements": 2,
        "warmup.steps": 3,
        "warmup.batch_size": 8,
        "privacy.batch_patients": 8,
        "performance.threads": 1,
    }
    return build_config({}, {**SMALL_RUN, **own, **changes})


def sums(request: Request) -> np.ndarray:
    dim = look_dims(make_config().image)[str(request.settings["look"])]
    rng = np.random.default_rng(request.round)
    rows = rng.normal(size=(2, dim)).astype(np.float32)
    rows[:, 0] = 40 * CONSTANT
    return rows


def release(index: int, request: Request, answer: object) -> tuple[Mapping[str, float], Mapping[str, np.ndarray]]:
    fields = {"epsilon_spent": 1.0, "epsilon_allowed": 10.0}
    if request.kind is Kind.WARMUP:
        return fields, {"embedding": sums(request)}
    return {**fields, "fake_accuracy": 0.5}, dict(request.arrays)


def run(path: Path, config: Config, seen: list[Request] | None = None) -> list[int]:
    asked = seen if seen is not None else []
    path.mkdir(exist_ok=True)
    records = run_sites(path, config, [lambda request: asked.append(request)] * 3, release)
    return [record.round for record in records]


def test_first_public_then_through_lenses_then_training(tmp_path: Path) -> None:
    asked: list[Request] = []
    rounds = run(tmp_path / "a", make_config(**{"privacy.epsilon": 900.0}), asked)
    assert rounds == [0, 1, 2, 3]
    kinds = [(request.kind, request.round, request.settings.get("look")) for request in asked[::3]]
    assert kinds == [
        (Kind.WARMUP, 0, "public"),
        (Kind.WARMUP, 1, "learned"),
        (Kind.WARMUP, 2, "learned"),
        (Kind.TRAIN, 3, None),
    ]
    assert not asked[0].arrays
    first, second = asked[3].arrays["lens.centre"], asked[6].arrays["lens.centre"]
    assert not np.array_equal(first, second)  # made anew from the generator as it stands


def test_few_patients_are_asked_for_means_alone(tmp_path: Path) -> None:
    asked: list[Request] = []
    run(tmp_path / "a", make_config(**{"privacy.epsilon": 1.0, "federation.rounds": 1}), asked)
    assert [request.settings["look"] for request in asked[::3]] == ["means", "means"]


def test_releases_are_kept_while_more_are_to_come(tmp_path: Path) -> None:
    run(tmp_path / "a", make_config())
    folder = tmp_path / "a" / "run" / "checkpoints"
    kept = []
    for number in (1, 2, 3):
        for path in sorted(folder.iterdir())[number:]:
            path.rename(path.with_suffix(".later"))
        state = checkpoint.load_latest(folder)
        assert state is not None
        kept.append((state.round, len(state.warmup)))
        for path in folder.glob("*.later"):
            path.rename(path.with_suffix(".safetensors"))
    assert kept == [(1, 2), (2, 0), (3, 0)]


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_run_that_is_resumed_ends_with_the_same_bytes(tmp_path: Path, last: int) -> None:
    def stops(request: Request) -> None:
        if request.round > last:
            raise KeyboardInterrupt  # what a kill leaves: everything up to here is on the disk

    config = make_config(**{"privacy.epsilon": 1.0})
    run(tmp_path / "whole", config)
    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run_sites(tmp_path / "cut", config, [stops] * 3, release)
    resumed = config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})
    assert run(tmp_path / "cut", resumed) == list(range(last + 1, 4))
    states = [checkpoint.load_latest(tmp_path / name / "run" / "checkpoints") for name in ("whole", "cut")]
    for name, array in states[0].weights.items():
        assert array.tobytes() == states[1].weights[name].tobytes()


def test_a_warm_up_that_drowns_asks_nobody(tmp_path: Path) -> None:
    asked: list[Request] = []
    with pytest.raises(ConfigError, match=r"noise is at most 2 times .* coordinates, the fewest there are"):
        run(tmp_path / "a", make_config(**{"privacy.epsilon": 0.05}), asked)
    assert asked == []


def test_a_start_is_where_the_generator_begins(tmp_path: Path) -> None:
    other = initial_pair(make_config(**{"federation.seed": 5})).generator
    ends = {}
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True, exist_ok=True)
        if name == "a":
            write_start(tmp_path / name / "run", other, make_config())
        run(tmp_path / name, make_config(**{"federation.rounds": 0, "warmup.steps": 1, "warmup.learning_rate": 1e-9}))
        state = checkpoint.load_latest(tmp_path / name / "run" / "checkpoints")
        ends[name] = state.weights["generator.first.weight"]
    wanted = other.first.weight.detach().numpy()
    assert np.allclose(ends["a"], wanted, atol=1e-6)
    assert np.allclose(ends["b"], get_weights(initial_pair(make_config()))["generator.first.weight"], atol=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_private_decoder_starts_from_what_the_generator_starts_from(tmp_path: Path, share: float) -> None:
    changes = {"model.name": "vae", "model.latent_dim": 14, "warmup.share": share, "warmup.refinements": 0}
    config, asked = make_config(**changes), list[Request]()
    other = initial_pair(make_config(**changes, **{"federation.seed": 9})).generator
    write_start(tmp_path / "run", other, config)
    run(tmp_path, config, asked)
    first = next(request.arrays for request in asked if request.kind is Kind.TRAIN)
    started = {f"generator.{name}": parameter.detach().numpy() for name, parameter in other.named_parameters()}
    assert all(np.array_equal(array, first[name]) for name, array in started.items()) == (share == 0)
    for name in started:
        assert np.array_equal(first[name], first[name.replace("generator", "discriminator.decoder")])


@pytest.mark.parametrize("present", [0, 1])
def test_with_fewer_members_than_min_sites_nobody_is_asked(tmp_path: Path, present: int) -> None:
    config = make_config(**{"federation.min_sites": 2})
    members = {"a": Member("a", 1, 100, plan(config, 100), greeting("a", 100, config))} if present else {}

    def connect(context: Context) -> Any:
        raise OSError("asked")

    link, folder = Link(LocalGrid(make_app(connect), 1)), RunFolder(tmp_path, "run")
    events = list(warm_up(link, config, members, Beginning("run", {}, None), folder))
    assert len(events) == 1
    assert isinstance(events[0], tuple)
    after, record = events[0]
    assert after is None
    assert record.refused == {}  # a site that is asked refuses


def together(**changes: object) -> Config:
    own = {"train.algorithm": "secure-sum", "train.steps_per_round": 1, "federation.rounds": 1, "warmup.refinements": 0}
    return make_config(**{**own, "privacy.epsilon": 10.0, **changes})


def whole(index: int, request: Request, answer: object) -> tuple[Mapping[str, float], Mapping[str, np.ndarray]]:
    fields = {"epsilon_spent": 1.0, "epsilon_allowed": 10.0}
    if request.kind is Kind.WARMUP:
        return fields, {"embedding": np.round(sums(request) / WARMUP_GRID).astype(np.int32)}
    return fields, {"gradient": np.zeros(sum(array.size for array in request.arrays.values()), np.int32)}


def run_together(path: Path, config: Config, behaviours: list[Any]) -> checkpoint.State:
    """Run to the state after the first release, which keeps its sum since another is to come."""
    path.mkdir(exist_ok=True)
    run_sites(path, config, behaviours, whole)
    folder = path / "run" / "checkpoints"
    for later in sorted(folder.iterdir())[1:]:
        later.unlink()
    state = checkpoint.load_latest(folder)
    assert state is not None
    return state


@pytest.mark.parametrize(("colluding", "parts"), [("all", 1), (0, 3), (1, 2)])
def test_the_sum_of_all_together_has_the_noise_of_its_shares(tmp_path: Path, colluding: object, parts: int) -> None:
    asked: list[Request] = []
    config = together(**{"privacy.colluding_sites": colluding, "warmup.refinements": 1})
    state = run_together(tmp_path, config, [lambda request: asked.append(request)] * 3)
    assert dict(asked[0].settings) == {"look": "public", "cohort_sites": 3, "cohort_patients": 600}
    alone = plan(config, 100, Cohort(3, 600)).charge_of_warmup().noise_multiplier
    assert state.warmup[0].noise_std == pytest.approx(alone * (3 / parts) ** 0.5)
    assert np.abs(state.warmup[0].arrays["sum"] - 3 * sums(asked[0])).max() <= 1.5 * WARMUP_GRID
    assert state.cohort == {"site-0": 100, "site-1": 200, "site-2": 300}


def test_a_site_without_the_warm_up_stays_in_the_cohort(tmp_path: Path) -> None:
    refuses: list[Any] = [lambda r: None, lambda r: RefusalCode.OVER_BUDGET if r.kind is Kind.WARMUP else None]
    config = together(**{"warmup.refinements": 1, "federation.rounds": 2})
    state = run_together(tmp_path, config, [*refuses, lambda r: None])
    assert set(state.cohort) == {"site-0", "site-1", "site-2"}
    alone = plan(config, 100, Cohort(3, 600)).charge_of_warmup().noise_multiplier
    assert state.warmup[0].noise_std == pytest.approx(alone * 2**0.5)


@pytest.mark.slow
def test_with_too_many_missing_a_warm_up_of_all_together_ends(tmp_path: Path) -> None:
    behaviours: list[Any] = [lambda r: None, lambda r: RefusalCode.UNREACHABLE, lambda r: RefusalCode.UNREACHABLE]
    with pytest.raises(FederationError, match=r"Round 0 heard 1 sites in 3 attempts.*colluding_sites=1 may be missing"):
        run_together(tmp_path, together(**{"privacy.colluding_sites": 1}), behaviours)
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints") is None


def follow(path: Path, config: Config, asked: list[tuple[int, Request]], says: Says) -> list[RoundRecord]:
    path.mkdir(exist_ok=True)

    def note(index: int, request: Request, answer: object) -> tuple[Mapping[str, float], Mapping[str, np.ndarray]]:
        asked.append((index, request))
        return release(index, request, answer)

    events = follow_sites(path, config, [lambda request: None] * 3, note, says=says)
    return [event for event in events if isinstance(event, RoundRecord)]


def test_who_refuses_makes_no_sum_clearer(tmp_path: Path) -> None:
    """The sum of three sites would be clear, that of the one which has images drowns: it pays nothing for it."""
    config = make_config(**{"privacy.epsilon": 0.3, "federation.min_sites": 1})
    asked: list[tuple[int, Request]] = []
    without = {"verdict": "no-data", "rounds_allowed": 0}
    with pytest.raises(ConfigError, match="noise is at most 2 times"):
        follow(tmp_path / "a", config, asked, lambda index: without if index else {})
    assert asked == []
    assert follow(tmp_path / "b", config, asked, lambda index: {})
    assert {index for index, _ in asked} == {0, 1, 2}


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_site_that_cannot_pay_for_all_releases_is_asked_for_none(tmp_path: Path, allowed: int) -> None:
    asked: list[tuple[int, Request]] = []
    poor = {"verdict": "over-budget", "rounds_allowed": allowed}
    records = follow(tmp_path / "a", make_config(), asked, lambda index: poor if index == 1 else {})
    assert [request.round for index, request in asked if index == 1] == [3]  # a round of training may be cheaper
    assert [record.refused for record in records] == [{"site-1": "over-budget"}] * 3 + [{}]


def test_a_warm_up_that_nobody_can_pay_for_asks_nobody(tmp_path: Path) -> None:
    asked: list[tuple[int, Request]] = []
    with pytest.raises(PolicyRefusal, match="Every site refuses this run for good"):
        follow(tmp_path / "a", make_config(), asked, lambda index: {"verdict": "over-budget", "rounds_allowed": 2})
    assert asked == []


@pytest.mark.parametrize("crash", [False, True])
def test_every_attempt_looks_at_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: bool) -> None:
    """With three sites the public map is clear, with those two that come back it would not be.

    They were charged by the first attempt, and would answer no other question of this round.
    """
    config = make_config(**{"privacy.epsilon": 6.0, "warmup.refinements": 0, "federation.min_sites": 2})
    config = build_config(config.model_dump(), {"federation.connect_timeout_s": 0.5})
    asked: list[Request] = []
    failing = [True]

    def fails(request: Request) -> RefusalCode | None:
        asked.append(request)
        if crash and failing[0]:
            raise KeyboardInterrupt
        return RefusalCode.INTERNAL if failing[0] else None

    def away() -> bool | set[int]:
        if len(asked) >= (1 if crash else 3):
            failing[0] = False
            return {2}
        return False

    monkeypatch.setattr(app, "RETRY_AFTER_S", 0.0)
    events = follow_sites(tmp_path, config, [fails] * 3, release, away)
    if crash:
        with pytest.raises(KeyboardInterrupt):
            list(events)
        config = config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})
        events = follow_sites(tmp_path, config, [fails] * 3, release, away)
    records = [event for event in events if isinstance(event, RoundRecord)]
    first = [request for request in asked if request.round == 0]
    assert len(records[0].sites) == 2
    assert {request.settings["look"] for request in first} == {"public"}
    members = [
        Member(f"site-{n}", n, 100 * n, plan(config, 100 * n), greeting(f"site-{n}", 100 * n, config)) for n in (1, 2)
    ]
    assert choose(outlook(config, [member.plan for member in members]), "public") == "means"


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_class_that_drowns_is_named(tmp_path: Path, share: float) -> None:
    """Nobody can know it before the sums are there, since no site tells how large its classes are."""

    def without_b(index: int, request: Request, answer: object) -> tuple[Mapping[str, float], Mapping[str, np.ndarray]]:
        fields, arrays = release(index, request, answer)
        if request.kind is Kind.WARMUP:
            arrays["embedding"][1, 0] = 0
        return fields, arrays

    config = make_config(**{"warmup.share": share, "warmup.refinements": 0, "federation.rounds": 1})
    first, last = run_sites(tmp_path, config, [lambda _: None] * 3, without_b)
    assert (first.unseen, last.unseen) == (("b",) if share else (), ())
    assert [record.unseen for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [first.unseen, ()]


def test_the_first_fit_leaves_sheets(tmp_path: Path) -> None:
    few = {"privacy.epsilon": 1.0, "federation.rounds": 1}  # for which no lens with a network is made
    config = make_config(**{"warmup.steps": 50, "warmup.refinements": 1, **few})
    run(tmp_path, config)
    folder = tmp_path / "run"
    assert [step for step, _ in fit_sheets(folder / "samples")] == [1, 5, 15]
    assert len({path.read_bytes() for _, path in fit_sheets(folder / "samples")}) == 3
    write_class_sheets(folder / "samples", config.image.classes)
    with Image.open(folder / "samples" / "class-a.png") as stacked:
        assert stacked.height == (3 + 2) * 66
