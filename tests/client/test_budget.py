"""What a site's budget says of the past and of a planned run, held against the ledger itself."""

import json

import pytest

from client.budget import look_up
from client.ledger import ChargeRequest, open_ledger
from client.policy import Policy
from common.config import Proposal
from common.crypto import SigningKey
from common.errors import ConfigError, PolicyRefusal
from common.messages import Kind
from common.plan import plan
from common.privacy import Charge, epsilon
from common.secure_sum import Cohort

KEY = SigningKey.from_bytes(bytes(range(32)))
DELTA = 1e-5
RULES = Policy(site="st-mary", declared_patients=200, max_epsilon=10.0, delta=DELTA)
ROUND = Charge(5.0, 0.1, 10)


def proposed(**sections):
    tree = Proposal().model_dump(mode="json")
    tree["image"]["classes"] = ["clear", "opacity"]
    for name, values in sections.items():
        tree[name] |= values
    return Proposal.model_validate(tree)


def rules(**changes):
    return RULES.model_copy(update=changes)


@pytest.fixture
def ledger(tmp_path):
    return open_ledger(tmp_path, KEY)


def charge(ledger, run, number, cost, kind=Kind.TRAIN, bound=10.0):
    return ledger.charge(ChargeRequest(run, number, kind, f"{run}-{number}"), cost, bound, DELTA)


def test_an_unused_site_has_all_of_it_left(ledger):
    found = look_up(RULES, ledger.entries)
    assert (found.spent, found.left, found.runs, found.forecast) == (0.0, 10.0, (), None)


def test_spent_is_what_the_ledger_says_and_each_run_stands_alone(ledger):
    for number in (1, 2, 3):
        charge(ledger, "run-b", number, ROUND)
    charge(ledger, "run-a", 0, Charge(2.0, 1.0, 1), Kind.WARMUP)
    found = look_up(RULES, ledger.entries)
    assert found.spent == ledger.spent(DELTA)
    assert found.left == 10.0 - found.spent
    assert [(run.run_id, run.releases) for run in found.runs] == [("run-b", 3), ("run-a", 1)]
    assert [run.epsilon for run in found.runs] == [epsilon([ROUND] * 3, DELTA), epsilon([Charge(2.0, 1.0, 1)], DELTA)]
    assert max(run.epsilon for run in found.runs) < found.spent < sum(run.epsilon for run in found.runs)
    assert look_up(rules(max_epsilon=0.1), ledger.entries).left == 0.0


def takes(ledger, number, cost, kind):
    try:
        charge(ledger, "planned", number, cost, kind)
    except PolicyRefusal:
        return False
    return True


def take_all(ledger, proposal):
    """Charge a whole run as the agent would, and return which requests the ledger took."""
    agreed = plan(proposal, RULES.declared_patients)
    last = proposal.refinements
    warmup = range(last + 1) if agreed.warmup_noise_multiplier else ()
    requests = [(number, agreed.charge_of_warmup(), Kind.WARMUP) for number in warmup]
    rounds = range(last + 1, proposal.federation.rounds + 1)
    requests += [(n, agreed.charge_of_round(proposal.train.steps_per_round), Kind.TRAIN) for n in rounds]
    return [number for number, cost, kind in requests if takes(ledger, number, cost, kind)]


@pytest.mark.parametrize(
    ("before", "share", "expected"),
    [
        (1e6, 0.7, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (1.994, 0.7, [0, 1, 2, 3, 4, 5, 6]),  # epsilon 2 is spent
        (0.7637, 0.7, [0]),  # 6
        (0.7637, 0.0, [1, 2, 3, 4]),
        (0.6003, 0.7, [1, 2, 3, 4, 5]),  # 8: the warm-up is too dear, some rounds are not
        (0.5004, 0.7, []),  # 9.99
    ],
)
def test_rounds_are_what_the_ledger_takes(ledger, before, share, expected):
    charge(ledger, "earlier", 1, Charge(before, 1.0, 1))
    proposal = proposed(warmup={"share": share})
    forecast = look_up(RULES, ledger.entries, proposal).forecast
    taken = take_all(ledger, proposal)
    assert taken == expected
    assert forecast.refusal is None
    assert forecast.rounds == len([number for number in taken if number])
    assert forecast.warmup == ((0 in taken) if share else None)
    assert forecast.epsilon_after == ledger.spent(DELTA)
    assert forecast.whole == (len(taken) == (9 if share else 8))
    assert (forecast.releases, forecast.nothing) == (len(taken), not taken)


@pytest.mark.parametrize(
    ("before", "refinements", "expected"),
    [
        (1e6, 2, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (1e6, 8, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (1e6, 16, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (0.7637, 2, None),
        (0.6003, 2, None),
        (0.6003, 8, None),
        (0.5004, 2, []),
    ],
)
def test_rounds_are_what_the_ledger_takes_with_refinements(ledger, before, refinements, expected):
    """A release that was paid for stands for a round of its number, the first of all for none."""
    charge(ledger, "earlier", 1, Charge(before, 1.0, 1))
    proposal = proposed(warmup={"refinements": refinements})
    forecast = look_up(RULES, ledger.entries, proposal).forecast
    taken = take_all(ledger, proposal)
    assert expected in (None, taken)
    releases = 1 + proposal.refinements
    assert (forecast.warmup_releases, forecast.rounds_planned) == (releases, 8)
    assert forecast.rounds == len([number for number in taken if number])
    assert forecast.warmup == (set(range(releases)) <= set(taken))
    assert forecast.epsilon_after == ledger.spent(DELTA)
    assert forecast.whole == (len(taken) == 9)
    assert (forecast.releases, forecast.nothing) == (len(taken), not taken)


@pytest.mark.parametrize(
    ("bounds", "sections", "word"),
    [
        ({"max_epsilon": 5.0}, {}, "max_epsilon"),
        ({"max_sample_rate": 0.3}, {}, "max_sample_rate"),
        ({"max_reply_bytes": 1_000_000}, {}, "max_reply_bytes"),
        ({"max_reply_bytes": 100}, {"federation": {"rounds": 0}}, "max_reply_bytes"),
        ({"min_noise_multiplier": 1.0}, {}, "noise multiplier of the warm-up"),
        ({"may_declare": ()}, {}, "may_declare"),
        ({}, {"train": {"steps_per_round": 1001}}, "max_steps_per_round"),
    ],
)
def test_a_run_that_the_policy_refuses_joins_nothing_and_says_why(ledger, bounds, sections, word):
    forecast = look_up(rules(**bounds), ledger.entries, proposed(**sections)).forecast
    assert word in forecast.refusal
    assert (forecast.rounds, bool(forecast.warmup), forecast.whole, forecast.epsilon_after) == (0, False, False, 0.0)
    assert forecast.nothing


def test_a_warm_up_alone(ledger):
    forecast = look_up(RULES, ledger.entries, proposed(federation={"rounds": 0})).forecast
    assert (forecast.warmup, forecast.rounds, forecast.rounds_planned, forecast.whole) == (True, 0, 0, True)


def test_a_run_that_cannot_be_planned_is_an_error(ledger):
    with pytest.raises(ConfigError, match="nothing to learn"):
        look_up(RULES, ledger.entries, proposed(federation={"rounds": 0}, warmup={"share": 0.0}))


def test_a_run_of_all_sites_together_needs_to_know_them(ledger):
    together = proposed(train={"algorithm": "secure-sum", "steps_per_round": 1}, federation={"rounds": 50})
    with pytest.raises(ConfigError, match="--cohort-sites and --cohort-patients"):
        look_up(RULES, ledger.entries, together)
    found = look_up(RULES, ledger.entries, together, Cohort(4, 1000)).forecast
    assert (found.rounds, found.whole, found.plan.sample_rate) == (50, True, 0.064)
    assert found.epsilon_after == plan(together, 200, Cohort(4, 1000)).epsilon
    parts = proposed(train={"algorithm": "secure-sum", "steps_per_round": 1}, privacy={"colluding_sites": 1})
    assert "allow_unmasked_shares" in look_up(RULES, ledger.entries, parts, Cohort(4, 1000)).forecast.refusal


def test_json_holds_everything(ledger):
    charge(ledger, "run-a", 1, ROUND)
    found = look_up(RULES, ledger.entries, proposed())
    tree = json.loads(json.dumps(found.as_json()))
    assert set(tree) == {"version", "site", "max_epsilon", "delta", "spent", "left", "runs", "forecast"}
    assert tree["runs"] == [{"run_id": "run-a", "releases": 1, "epsilon": found.spent}]
    assert tree["left"] == found.left
    assert tree["forecast"]["plan"]["sample_rate"] == 0.32
    assert (tree["forecast"]["whole"], tree["forecast"]["rounds"]) == (False, found.forecast.rounds)
    assert look_up(RULES, ledger.entries).as_json()["forecast"] is None
