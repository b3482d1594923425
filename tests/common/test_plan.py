"""The plan of a run: within the proposal, the same from the same public values, and refused when it cannot be."""

import dataclasses

import pytest

from common.config import Proposal
from common.errors import ConfigError
from common.plan import delta_warning, plan
from common.privacy import Charge, epsilon
from common.secure_sum import Cohort

DELTA = 1e-5


def test_plan_within_the_proposal_and_deterministic():
    proposal = Proposal()
    first, second = plan(proposal, 200), plan(proposal, 200)
    assert first == second
    assert first.sample_rate == 0.32
    assert first.divisor == pytest.approx(64)
    assert first.steps == 96
    rounds = [first.charge_of_round(proposal.train.steps_per_round)] * proposal.federation.rounds
    assert epsilon([first.charge_of_warmup(), *rounds], DELTA) == first.epsilon
    assert 9.98 < first.epsilon <= 10.0
    assert 6.98 < epsilon([first.charge_of_warmup()], DELTA) <= 7.0


def changed(**sections):
    tree = Proposal().model_dump(mode="json")
    for name, values in sections.items():
        tree[name] |= values
    return Proposal.model_validate(tree)


def test_plan_without_warmup_and_without_rounds():
    alone = plan(changed(warmup={"share": 0.0}), 200)
    assert alone.warmup_noise_multiplier is None
    assert epsilon([alone.charge_of_round(96)], DELTA) == alone.epsilon <= 10.0
    with pytest.raises(ConfigError, match="no warm-up"):
        alone.charge_of_warmup()
    once = plan(changed(federation={"rounds": 0}), 200)
    assert once.train_noise_multiplier is None
    assert once.steps == 0
    assert 9.98 < epsilon([once.charge_of_warmup()], DELTA) <= 10.0
    with pytest.raises(ConfigError, match="no training rounds"):
        once.charge_of_round(12)


def test_plan_with_fewer_patients_than_a_batch_takes_all_of_them():
    full = plan(Proposal(), 40)
    assert full.sample_rate == 1.0
    assert full.divisor == 40


def test_plan_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="nothing to learn"):
        plan(changed(federation={"rounds": 0}, warmup={"share": 0.0}), 200)
    with pytest.raises(ConfigError, match="declared_patients"):
        plan(Proposal(), 0)
    with pytest.raises(ConfigError, match="steps"):
        plan(changed(train={"steps_per_round": 10**5}, federation={"rounds": 1000}), 200)


def test_delta_warning():
    assert delta_warning(1e-5, 200) is None
    for delta in (1 / 200, 0.1):
        warning = delta_warning(delta, 200)
        assert warning is not None
        assert "1/200" in warning
        assert "5e-04" in warning


TOGETHER = {"algorithm": "secure-sum", "steps_per_round": 1}


def test_plan_of_a_cohort_is_the_same_at_every_site():
    proposal = changed(train=TOGETHER, federation={"rounds": 100})
    small, large = (plan(proposal, declared, Cohort(5, 1000)) for declared in (50, 400))
    assert (small.sample_rate, small.divisor, small.steps) == (0.064, 64.0, 100)
    assert small == dataclasses.replace(large, declared_patients=50)
    assert small.share_noise_multiplier == small.train_noise_multiplier
    assert 9.98 < epsilon([small.charge_of_warmup(), Charge(small.train_noise_multiplier, 0.064, 100)], DELTA) <= 10.0


def test_plan_splits_the_noise_and_not_the_charge():
    whole, parts = (
        plan(changed(train=TOGETHER, privacy={"colluding_sites": t}), 50, Cohort(5, 1000)) for t in ("all", 1)
    )
    assert (whole.noise_shares, parts.noise_shares) == (1, 4)
    assert whole.charge_of_round(1) == parts.charge_of_round(1)
    assert parts.share_noise_multiplier == parts.train_noise_multiplier / 2
    assert epsilon([Charge(2 * parts.share_noise_multiplier, 0.064, 8)], DELTA) <= 10.0  # what four honest sites add


@pytest.mark.parametrize("cohort", [Cohort(1, 50), Cohort(2, 120), Cohort(9000, 10**8)])
def test_no_false_cohort_costs_less_than_it_gives(cohort):
    """Rate and noise of the charge are those of the draw and of the sum, and the whole is within the proposal."""
    agreed = plan(changed(train=TOGETHER), 50, cohort)
    charge = agreed.charge_of_round(1)
    assert (charge.sample_rate, charge.noise_multiplier) == (agreed.sample_rate, agreed.train_noise_multiplier)
    assert agreed.share_noise_multiplier * agreed.noise_shares**0.5 == pytest.approx(charge.noise_multiplier)
    assert epsilon([agreed.charge_of_warmup(), *[charge] * agreed.steps], DELTA) == agreed.epsilon <= 10.0


def test_plan_without_a_cohort_holds_the_warm_up_alone():
    before = plan(changed(train=TOGETHER), 50)
    assert (before.steps, before.train_noise_multiplier) == (0, None)
    after = plan(changed(train=TOGETHER), 50, Cohort(3, 200))
    assert before.charge_of_warmup() == after.charge_of_warmup()
    with pytest.raises(ConfigError, match="no training rounds"):
        before.share_noise_multiplier  # noqa: B018
    nothing = plan(changed(train=TOGETHER, warmup={"share": 0.0}), 50)
    assert (nothing.epsilon, nothing.warmup_noise_multiplier) == (0.0, None)


def test_plan_refuses_a_cohort_that_does_not_fit():
    with pytest.raises(ConfigError, match="local has no cohort"):
        plan(Proposal(), 50, Cohort(3, 200))
    with pytest.raises(ConfigError, match="below the number of sites"):
        plan(changed(train=TOGETHER, privacy={"colluding_sites": 3}), 50, Cohort(3, 200))
    with pytest.raises(ConfigError, match="in one share"):
        plan(changed(train=TOGETHER, privacy={"batch_patients": 16_384}), 50, Cohort(3, 10**6))


@pytest.mark.parametrize("refinements", [0, 1, 3, 7])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_releases_of_the_warm_up_are_within_their_share_together(refinements, share):
    """All of them at their share, none at a share of its own; the training that is left fills the rest."""
    proposal = changed(warmup={"share": share, "refinements": refinements})
    agreed = plan(proposal, 200)
    releases = [agreed.charge_of_warmup()] * (1 + refinements)
    assert 0.99 * share * 10.0 < epsilon(releases, DELTA) <= share * 10.0
    assert agreed.steps == (8 - refinements) * proposal.train.steps_per_round
    rounds = [agreed.charge_of_round(proposal.train.steps_per_round)] * (8 - refinements)
    assert 9.98 < epsilon([*releases, *rounds], DELTA) == agreed.epsilon <= 10.0


@pytest.mark.parametrize("asked", [8, 16])
def test_refinements_that_leave_no_training_get_all_of_epsilon(asked):
    agreed = plan(changed(warmup={"refinements": asked}), 200)
    assert (agreed.steps, agreed.train_noise_multiplier) == (0, None)
    assert 9.98 < epsilon([agreed.charge_of_warmup()] * 9, DELTA) == agreed.epsilon <= 10.0


def test_more_releases_are_each_noisier_and_none_without_a_warm_up():
    few, many = (plan(changed(warmup={"refinements": n}), 200).warmup_noise_multiplier for n in (1, 4))
    assert few < many
    none = changed(warmup={"share": 0.0, "refinements": 4})
    assert plan(none, 200) == plan(changed(warmup={"share": 0.0}), 200)


def test_refinements_with_a_cohort():
    proposal = changed(train=TOGETHER, federation={"rounds": 100}, warmup={"refinements": 3})
    before, after = plan(proposal, 50), plan(proposal, 50, Cohort(5, 1000))
    assert (before.steps, after.steps) == (0, 97)
    assert before.charge_of_warmup() == after.charge_of_warmup()
    releases = [after.charge_of_warmup()] * 4
    assert epsilon(releases, DELTA) <= 7.0
    assert epsilon([*releases, Charge(after.train_noise_multiplier, 0.064, 97)], DELTA) == after.epsilon <= 10.0
