"""The plan of a run: within the proposal, the same from the same public values, and refused when it cannot be."""

import pytest

from common.config import Proposal
from common.errors import ConfigError
from common.plan import delta_warning, plan
from common.privacy import epsilon

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
