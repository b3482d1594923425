import dataclasses
import tomllib

import pytest

from client.policy import Policy, PolicyFile, check_hello, check_plan, check_proposal, check_reply, load, save
from common.config import MAX_EPSILON, Proposal
from common.errors import ConfigError, PolicyRefusal, RefusalCode
from common.plan import Plan
from common.secure_sum import Cohort

POLICY = Policy(site="st-mary", declared_patients=200, max_epsilon=10.0, delta=1e-5, min_noise_multiplier=0.5)
PLAN = Plan(200, 0.32, 0.67, 2.5, 96, 9.99, 1e-5)


def proposed(**sections):
    tree = Proposal().model_dump(mode="json")
    for name, values in sections.items():
        tree[name] |= values
    return Proposal.model_validate(tree)


def policy(**changes):
    return POLICY.model_copy(update=changes)


def test_what_fits_passes():
    check_hello(POLICY)
    check_proposal(POLICY, Proposal())
    check_plan(POLICY, PLAN)
    check_reply(POLICY, POLICY.max_reply_bytes)


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
        check_proposal(POLICY, proposed(**sections))
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
        ({"sample_rate": 0.51}, r"sample rate=0.51 <= 0.5 \(max_sample_rate\)"),
        ({"sample_rate": float("nan")}, "sample rate"),
        ({"declared_patients": 400}, "declared_patients of the plan=400"),
    ],
)
def test_a_plan_over_a_bound_is_refused(change, word):
    with pytest.raises(PolicyRefusal, match=word):
        check_plan(POLICY, dataclasses.replace(PLAN, **change))


def test_plans_without_warmup_or_rounds_pass():
    check_plan(POLICY, dataclasses.replace(PLAN, warmup_noise_multiplier=None))
    check_plan(POLICY, dataclasses.replace(PLAN, train_noise_multiplier=None))


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"min_patients": 300}, "min_patients"),
        ({"allowed_models": ("mlp",)}, r"model\.name=dcgan in mlp \(allowed_models\)"),
        ({"allowed_models": ()}, r"model\.name=dcgan in nothing"),
        ({"allowed_image_sizes": (28, 64)}, r"image\.size=32 in 28, 64 \(allowed_image_sizes\)"),
        ({"max_rounds": 7}, "max_rounds"),
        ({"max_steps_per_round": 11}, "max_steps_per_round"),
    ],
)
def test_what_the_site_narrows_binds(bounds, words):
    with pytest.raises(PolicyRefusal, match=words):
        check_proposal(policy(**bounds), Proposal())


def test_a_part_of_the_noise_is_enough_only_where_the_policy_says_so():
    parts = dataclasses.replace(PLAN, cohort=Cohort(5, 1000), noise_shares=2)
    with pytest.raises(
        PolicyRefusal, match=r"parts of the noise=2 <= 1 \(allow_unmasked_shares holds in simulation alone"
    ):
        check_plan(POLICY, parts)
    check_plan(POLICY, dataclasses.replace(parts, noise_shares=1))
    check_plan(policy(allow_unmasked_shares=True), parts)


def test_everybody_in_every_step_only_where_the_policy_says_so():
    everybody = dataclasses.replace(PLAN, sample_rate=1.0)
    with pytest.raises(PolicyRefusal, match="max_sample_rate"):
        check_plan(POLICY, everybody)
    check_plan(policy(max_sample_rate=1.0), everybody)
    check_plan(POLICY, dataclasses.replace(everybody, train_noise_multiplier=None, steps=0))  # the warm-up alone


@pytest.mark.parametrize("may_declare", [(), ("name",), ("patients",)])
def test_without_leave_to_declare_the_site_says_nothing_and_takes_part_in_nothing(may_declare):
    silent = policy(may_declare=may_declare)
    for call in (lambda: check_hello(silent), lambda: check_proposal(silent, Proposal())):
        with pytest.raises(PolicyRefusal, match="may_declare") as caught:
            call()
        assert caught.value.code is RefusalCode.POLICY


def test_a_reply_may_not_be_larger_than_the_bound():
    with pytest.raises(PolicyRefusal, match=r"bytes of the reply=1001 <= 1000 \(max_reply_bytes\)"):
        check_reply(policy(max_reply_bytes=1000), 1001)


def test_round_trip(tmp_path):
    narrowed = policy(may_declare=(), allowed_image_sizes=(64,), max_sample_rate=0.25)
    for given in (POLICY, narrowed):
        save(tmp_path / "policy.toml", given)
        assert load(tmp_path / "policy.toml") == given


def test_every_key_is_explained_in_the_file_itself(tmp_path):
    save(tmp_path / "policy.toml", POLICY)
    text = (tmp_path / "policy.toml").read_text()
    assert list(tomllib.loads(text)) == list(Policy.model_fields)
    assert max(map(len, text.splitlines())) <= 120
    paragraphs = [part.splitlines() for part in text.split("\n\n")[1:]]
    for name, (*comment, key) in zip(Policy.model_fields, paragraphs, strict=True):
        assert key.startswith(f"{name} = ")
        assert comment
        said = " ".join(line.removeprefix("# ") for line in comment)
        assert all(line.startswith("# ") for line in comment)
        assert said == " ".join((Policy.model_fields[name].description or "").split())
        assert len(said) > 20


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
        (BASE.replace("3.0", "1000001.0"), "max_epsilon .*: .* less than or equal to 1000000"),
        (BASE.replace("3.0", "1e300"), "max_epsilon"),
        (BASE + "min_grad_norm = 200.0\n", "exceeds max_grad_norm"),
        (BASE + "version = 2\n", "version"),
        ("site = \n", "not TOML: .*line 1.*Mend that line"),
        ('site = "a"\n', "max_epsilon"),
        (BASE + 'allowed_models = ["biggan"]\n', "allowed_models"),
        (BASE + "allowed_image_sizes = [48]\n", "allowed_image_sizes"),
        (BASE + 'may_declare = ["labels"]\n', "may_declare"),
        (BASE + "max_sample_rate = 0.0\n", "max_sample_rate"),
        (BASE + "max_sample_rate = 1.5\n", "max_sample_rate"),
        (BASE + "max_sample_rate = nan\n", "max_sample_rate"),
        (BASE + "max_reply_bytes = -1\n", "max_reply_bytes"),
        ("#" * 70_000, "at most"),
    ],
)
def test_bad_policies_are_explained(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        load(written(tmp_path, text))


def test_the_loosest_policy_reads(tmp_path):
    """The server takes what it allows: no site is charged for a reply that is thrown away."""
    assert load(written(tmp_path, BASE.replace("3.0", f"{MAX_EPSILON}"))).max_epsilon == MAX_EPSILON


def test_missing_policy(tmp_path):
    with pytest.raises(ConfigError, match="Could not read"):
        load(tmp_path / "policy.toml")


@pytest.mark.parametrize(
    "line", ["max_epsilon = true", 'max_epsilon = "9"', "max_rounds = true", "min_grad_norm = 1e-300"]
)
def test_a_value_of_another_type_is_refused(tmp_path, line):
    path = tmp_path / "policy.toml"
    save(path, Policy(site="a", declared_patients=40, max_epsilon=8.0, delta=1e-5))
    key = line.partition(" ")[0]
    lines = [line if old.startswith(f"{key} ") else old for old in path.read_text().splitlines()]
    assert line in lines
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=key):
        load(path)


def test_as_it_stands(tmp_path):
    path = tmp_path / "policy.toml"
    save(path, POLICY)
    file = PolicyFile(path)
    save(path, POLICY.model_copy(update={"max_epsilon": 0.5}))
    file.refresh()
    assert file.seen.max_epsilon == 0.5
    path.write_text("max_epsilon = ")
    with pytest.raises(PolicyRefusal, match="until policy") as refused:
        file.refresh()
    assert refused.value.code is RefusalCode.INTERNAL


def test_changes_are_told(tmp_path, caplog):
    path = tmp_path / "policy.toml"
    save(path, POLICY)
    file = PolicyFile(path)
    file.refresh()
    assert not caplog.records
    save(path, POLICY.model_copy(update={"max_rounds": 7}))
    file.refresh()
    file.refresh()
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"max_rounds: {POLICY.max_rounds} -> 7" in line
