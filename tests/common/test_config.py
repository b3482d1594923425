import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import MAX_REFINEMENTS, Proposal
from common.config_text import build_config, known_keys, parse_changes, parse_proposal, read_config, to_toml
from common.errors import ConfigError, StorageError


def test_toml_round_trip_keeps_every_value() -> None:
    config = build_config({}, {"privacy.epsilon": 3.5, "image.classes": ('a "quoted"', "b"), "run.out": "x"})
    assert build_config(tomllib.loads(to_toml(config))) == config


def test_print_config_holds_every_key() -> None:
    tree = tomllib.loads(to_toml(build_config({})))
    assert {f"{section}.{key}" for section, values in tree.items() for key in values} == set(known_keys())


@pytest.mark.parametrize(
    ("tree", "near"),
    [
        ({"privacy": {"epsilom": 1.0}}, "privacy.epsilon"),
        ({"federation": {"round": 1}}, "federation.rounds"),
        ({"privcy": {}}, "privacy"),
    ],
)
def test_unknown_key_names_the_nearest(tree: dict, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        build_config(tree)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("privacy.epsilon", 0.0),
        ("privacy.epsilon", -1.0),
        ("privacy.epsilon", float("nan")),
        ("privacy.epsilon", 1_000_001.0),
        ("privacy.epsilon", float("inf")),
        ("privacy.delta", 0.0),
        ("privacy.delta", 1.0),
        ("image.size", 33),
        ("simulation.partition", "dirichlet:-1"),
        ("simulation.partition", "dirichlet:nan"),
        ("simulation.partition", "dirichlet:inf"),
        ("simulation.partition", "unequal"),
        ("federation.rounds", -1),
        ("model.name", "biggan"),
        ("server.aggregation", "sum"),
    ],
)
def test_value_out_of_bounds_names_key_and_value(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        build_config({}, {key: value})


def test_changes_are_toml_values_or_plain_texts() -> None:
    texts = ["train.ema_decay=0.5", "image.classes = ['a', 'b']", "simulation.partition=dirichlet:0.3", "run.out='7'"]
    assert parse_changes(texts) == {
        "train.ema_decay": 0.5,
        "image.classes": ["a", "b"],
        "simulation.partition": "dirichlet:0.3",
        "run.out": "7",
    }


@pytest.mark.parametrize("text", ["rounds=3", "federation.rounds", "federation.rounds=", "=3"])
def test_changes_without_a_dotted_key_or_a_value_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set SECTION\.KEY=VALUE"):
        parse_changes([text])


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"federation\.rounds = 0"):
        build_config({"federation": {"rounds": 0}, "warmup": {"share": 0.0}})


def test_digest_speed_is_free() -> None:
    base = build_config({})
    for key, value in (("performance.threads", 1), ("run.out", "elsewhere"), ("simulation.sites", 7)):
        assert build_config({}, {key: value}).digest() == base.digest()
    for key, value in (("privacy.epsilon", 1.0), ("train.steps_per_round", 1), ("federation.seed", 1)):
        assert build_config({}, {key: value}).digest() != base.digest()


def test_proposal_holds_shared_sections_only() -> None:
    config = build_config({}, {"simulation.data": "/somewhere/private", "run.out": "/elsewhere"})
    assert "somewhere" not in config.proposal()
    assert "elsewhere" not in config.proposal()
    assert parse_proposal(config.proposal()).digest() == config.digest()


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.text(max_size=200))
def test_garbage_proposals_are_refused(text: str) -> None:
    try:
        assert isinstance(parse_proposal(text), Proposal)
    except ConfigError:
        pass


def test_long_proposal_is_refused_before_parsing() -> None:
    with pytest.raises(ConfigError, match="at most"):
        parse_proposal("[" * 1_000_000)


def test_config_file_missing_and_broken(tmp_path) -> None:
    with pytest.raises(StorageError, match="Could not read"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[privacy\nepsilon=")
    with pytest.raises(ConfigError, match="not TOML"):
        read_config(tmp_path / "broken.toml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.loss": "hinge"}, r"train\.loss"),
        ({"model.name": "vae", "train.loss": "wasserstein"}, "evidence lower bound; remove train.loss = wasserstein"),
        ({"model.name": "vae", "train.d_steps_per_g_step": "adaptive"}, "adaptive reads how many fakes"),
        ({"train.loss": "wasserstein", "train.d_steps_per_g_step": "adaptive"}, "adaptive reads how many fakes"),
    ],
)
def test_losses_that_do_not_fit_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_config({}, changes)
    assert build_config({}, {"train.d_steps_per_g_step": "adaptive"}).train.loss == "logistic"
    assert build_config(TOGETHER, {"model.name": "vae"}).model.name == "vae"


TOGETHER = {"train": {"algorithm": "secure-sum", "steps_per_round": 1}}


def test_secure_sum_is_a_key_and_local_the_default() -> None:
    assert build_config({}).train.algorithm == "local"
    config = build_config(TOGETHER, {"privacy.colluding_sites": 2})
    assert (config.train.algorithm, config.privacy.colluding_sites) == ("secure-sum", 2)
    assert build_config(TOGETHER).privacy.colluding_sites == "all"
    assert parse_proposal(config.proposal()) == Proposal.model_validate_json(config.proposal())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.steps_per_round": 2}, "train.steps_per_round = 1"),
        ({"train.d_steps_per_g_step": "adaptive"}, "train.d_steps_per_g_step"),
        ({"server.optimizer": "adam"}, r"\[server\]"),
        ({"server.aggregation": "median", "federation.min_sites": 3}, r"\[server\]"),
        ({"train.algorithm": "local", "privacy.colluding_sites": 1}, "privacy.colluding_sites"),
        ({"privacy.colluding_sites": -1}, "privacy.colluding_sites"),
        ({"privacy.colluding_sites": "some"}, "privacy.colluding_sites"),
        ({"train.algorithm": "secret-sum"}, "train.algorithm"),
    ],
)
def test_secure_sum_refuses_what_does_not_fit(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_config(TOGETHER, changes)


@pytest.mark.parametrize(
    ("share", "asked", "rounds", "refinements"),
    [(0.5, 0, 3, 0), (0.5, 2, 3, 2), (0.5, 3, 3, 3), (0.5, 9, 3, 3), (0.5, 2, 0, 0), (0.0, 2, 3, 0)],
)
def test_refinements_and_training_rounds_are_the_rounds(
    share: float, asked: int, rounds: int, refinements: int
) -> None:
    config = build_config({"warmup": {"share": share, "refinements": asked}, "federation": {"rounds": rounds}})
    assert (config.refinements, config.training_rounds) == (refinements, rounds - refinements)
    assert parse_proposal(config.proposal()).refinements == refinements


@pytest.mark.parametrize("value", [-1, MAX_REFINEMENTS + 1, 0.5])
def test_refinements_are_bounded(value: object) -> None:
    with pytest.raises(ConfigError, match=r"warmup\.refinements"):
        build_config({}, {"warmup.refinements": value})
    assert build_config({}, {"warmup.refinements": MAX_REFINEMENTS}).warmup.refinements == MAX_REFINEMENTS


def test_digest_holds_the_refinements() -> None:
    assert build_config({}, {"warmup.refinements": 1}).digest() != build_config({}).digest()
