import dataclasses

import pytest

from client.policy import Policy, check, load, save
from common.config import Proposal
from common.errors import ConfigError, PolicyRefusal, RefusalCode
from common.privacy import Plan

POLICY = Policy(site="st-mary", declared_patients=200, max_epsilon=10.0, delta=1e-5, min_noise_multiplier=0.5)
PLAN = Plan(200, 0.32, 0.67, 2.5, 96, 9.99, 1e-5)


def proposed(**sections):
    tree = Proposal().model_dump(mode="json")
    for name, values in sections.items():
        tree[name] |= values
    return Proposal.model_validate(tree)


def test_what_fits_passes():
    check(POLICY, Proposal(), PLAN)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"privacy": {"epsilon": 10.1}}, ("privacy.epsilon=10.1", "<= 10.0", "max_epsilon")),
        ({"privacy": {"delta": 2e-5}}, ("privacy.delta=2e-05", "== 1e-05")),
        ({"privacy": {"delta": 1e-6}}, ("privacy.delta=1e-06", "== 1e-05")),
        ({"privacy": {"min_patients": 201}}, ("declared_patients=200", ">= 201")),
        ({"privacy": {"max_grad_norm": 1e9}}, ("privacy.max_grad_norm", "<= 100.0")),
        ({"privacy": {"max_grad_norm": 1e-9}}, ("privacy.max_grad_norm", ">= 0.001")),
        ({"federation": {"rounds": 1001}}, ("federation.rounds=1001", "max_rounds")),
        ({"train": {"steps_per_round": 10**5}}, ("train.steps_per_round", "max_steps_per_round")),
    ],
)
def test_a_proposal_over_a_bound_is_refused(sections, words):
    with pytest.raises(PolicyRefusal) as caught:
        check(POLICY, proposed(**sections), PLAN)
    assert caught.value.code is RefusalCode.POLICY
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"warmup_noise_multiplier": 0.49}, "noise multiplier of the warm-up=0.49"),
        ({"train_noise_multiplier": 0.49}, "noise multiplier of the training=0.49"),
        ({"train_noise_multiplier": float("nan")}, "noise multiplier of the training"),
        ({"epsilon": 10.2}, "epsilon of the plan"),
        ({"declared_patients": 400}, "declared_patients of the plan=400"),
    ],
)
def test_a_plan_over_a_bound_is_refused(change, word):
    with pytest.raises(PolicyRefusal, match=word):
        check(POLICY, Proposal(), dataclasses.replace(PLAN, **change))


def test_plans_without_warmup_or_rounds_pass():
    check(POLICY, Proposal(), dataclasses.replace(PLAN, warmup_noise_multiplier=None))
    check(POLICY, Proposal(), dataclasses.replace(PLAN, train_noise_multiplier=None))


def test_min_patients_of_the_site_and_its_models_bind():
    strict = POLICY.model_copy(update={"min_patients": 300, "allowed_models": ("mlp",)})
    with pytest.raises(PolicyRefusal, match="min_patients"):
        check(strict, Proposal(), PLAN)
    with pytest.raises(PolicyRefusal, match=r"model\.name=dcgan in mlp"):
        check(strict.model_copy(update={"min_patients": 20}), Proposal(), PLAN)


def test_round_trip(tmp_path):
    save(tmp_path / "policy.toml", POLICY)
    assert load(tmp_path / "policy.toml") == POLICY


def written(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


BASE = 'site = "a"\ndeclared_patients = 100\nmax_epsilon = 3.0\ndelta = 1e-5\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE + "max_epsilom = 3.0\n", "Unknown key max_epsilom .* nearest known key is max_epsilon"),
        (BASE.replace("100", "1"), "declared_patients"),
        (BASE.replace('"a"', '"../a"'), "site"),
        (BASE.replace("1e-5", "1.0"), "delta"),
        (BASE + "min_grad_norm = 200.0\n", "exceeds max_grad_norm"),
        (BASE + "version = 2\n", "version"),
        ("site = ", "not TOML"),
        ('site = "a"\n', "max_epsilon"),
        (BASE + 'allowed_models = ["resnet"]\n', "allowed_models"),
        ("#" * 70_000, "at most"),
    ],
)
def test_bad_policies_are_explained(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        load(written(tmp_path, text))


def test_missing_policy(tmp_path):
    with pytest.raises(ConfigError, match="Could not read"):
        load(tmp_path / "policy.toml")
