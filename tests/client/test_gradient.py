"""One round of secure-sum at a site: what it draws, what it adds, and what the agent lets out."""

import dataclasses
import time

import numpy as np
import pytest
import torch

from client import journal
from client import policy as policies
from client.agent import answer, open_site
from client.channel import pack_reply, pack_request, unpack_reply, unpack_request
from client.gradient import gradient_share
from client.journal import check_egress, release_schema
from client.ledger import read_ledger
from common.crypto import KeyStream
from common.errors import RefusalCode
from common.messages import Kind
from common.models import build
from common.plan import plan
from common.privacy import Charge, epsilon
from common.seal import seal_request
from common.secure_sum import GRID, WARMUP_GRID, Cohort
from tests.hostile_requests import BIAS, WEIGHTS, changed
from tests.pinned import COORDINATOR, pin
from tests.tiny_site import COHORT, PROPOSAL, TOGETHER, gradient_request, numbered, train_request, warmup_request

CHEAP_CODES = (RefusalCode.POLICY, RefusalCode.BAD_REQUEST)


@pytest.fixture
def site(tiny_home):
    return open_site(tiny_home)


def with_policy(site, **changes):
    policies.save(site.home.policy, site.policy.model_copy(update=changes))
    return site


def charges(site):
    return [entry.charge for entry in read_ledger(site.home.ledger, site.key.verify_key).entries]


def released(site):
    return journal.entries(site.home.journal, site.key.verify_key)


def colluding(number):
    tree = TOGETHER.model_dump(mode="json")
    tree["privacy"]["colluding_sites"] = number
    return type(TOGETHER).model_validate(tree)


def share(dataset, proposal=TOGETHER, cohort=COHORT, noise=None, key=bytes(32)):
    agreed = plan(proposal, 40, cohort)
    if noise is not None:
        agreed = dataclasses.replace(agreed, train_noise_multiplier=noise)
    pair = build(proposal.model, proposal.image, 2, torch.Generator().manual_seed(3))
    before = [parameter.clone() for parameter in pair.discriminator.parameters()]
    made = gradient_share(
        dataset, pair.discriminator, proposal, agreed, KeyStream(key), torch.Generator().manual_seed(4)
    )
    assert all(torch.equal(old, new) for old, new in zip(before, pair.discriminator.parameters(), strict=True))
    return made


def test_share_comes_from_the_secret_alone():
    dataset = numbered([1] * 40, size=28)
    first = share(dataset)
    np.testing.assert_array_equal(first, share(dataset))
    assert not np.array_equal(first, share(dataset, key=bytes([1]) * 32))


def test_share_has_a_part_of_the_noise_and_the_plan_all_of_it():
    nobody = numbered([1] * 40, size=28)
    for proposal, parts in ((TOGETHER, 1), (colluding(2), 1), (colluding(1), 2), (colluding(0), 3)):
        agreed = plan(proposal, 40, COHORT)
        assert agreed.noise_shares == parts
        assert agreed.train_noise_multiplier == plan(TOGETHER, 40, COHORT).train_noise_multiplier
        deviation = share(nobody, proposal, noise=1000.0).std() * GRID
        assert deviation == pytest.approx(1000.0 / parts**0.5, rel=0.03)  # 6,700 coordinates: 3.4 standard errors


def test_a_round_carries_whole_numbers_and_nothing_else(site):
    reply = answer(site, gradient_request())
    assert reply.refusal is None
    assert set(reply.fields) == {"epsilon_spent", "epsilon_allowed"}
    numbers = sum(array.size for array in gradient_request().arrays.values())
    check_egress(reply, release_schema(Kind.GRADIENT, {"gradient": (numbers,)}, "int32"))
    assert reply.arrays["gradient"].dtype == np.int32
    assert all(name.startswith("discriminator.") for name in gradient_request().arrays)
    assert [(entry.kind, entry.round) for entry in released(site)] == [(Kind.GRADIENT, 1)]


def test_request_and_reply_pass_the_socket(site):
    request = unpack_request(pack_request(gradient_request()))
    reply = answer(site, request)
    np.testing.assert_array_equal(unpack_reply(pack_reply(reply)).arrays["gradient"], reply.arrays["gradient"])


def test_charge_is_one_step_at_the_rate_of_all_sites(site):
    reply = answer(site, gradient_request())
    agreed = plan(TOGETHER, 40, COHORT)
    assert charges(site) == [Charge(agreed.train_noise_multiplier, 4 / 120, 1)]
    assert reply.fields["epsilon_spent"] == epsilon(charges(site), 1e-5)


def test_a_whole_run_costs_what_was_proposed(site):
    warmup = answer(site, warmup_request(proposal=TOGETHER))
    assert warmup.refusal is None
    rounds = TOGETHER.federation.rounds
    replies = [answer(site, gradient_request(number)) for number in range(1, rounds + 1)]
    assert all(reply.refusal is None for reply in replies)
    assert 0.95 * 8 < replies[-1].fields["epsilon_spent"] <= 8.0
    assert answer(site, gradient_request(rounds + 1)).refusal is RefusalCode.BAD_REQUEST


def test_repeat_is_free(site):
    first = answer(site, gradient_request())
    assert pack_reply(answer(site, gradient_request())) == pack_reply(first)
    assert (len(charges(site)), len(released(site))) == (1, 1)


def test_another_cohort_in_the_same_round_is_a_replay(site):
    answer(site, gradient_request())
    assert answer(site, gradient_request(cohort=Cohort(3, 130))).refusal is RefusalCode.REPLAYED
    assert (len(charges(site)), len(released(site))) == (1, 1)


def test_another_cohort_in_a_later_round_is_refused_before_the_charge(site):
    assert answer(site, gradient_request(1)).refusal is None
    assert answer(site, gradient_request(2, cohort=Cohort(9, 1000))).refusal is RefusalCode.POLICY
    assert (len(charges(site)), len(released(site))) == (1, 1)
    assert answer(site, gradient_request(2)).refusal is None


def test_any_cohort_is_charged_for_what_it_is(site):
    """No false cohort costs less than it gives: the rate and the noise that are charged are those that are used."""
    more = Cohort(9, 1000)
    assert answer(site, gradient_request(1, cohort=more)).refusal is None
    agreed = plan(TOGETHER, 40, more)
    assert agreed.train_noise_multiplier < plan(TOGETHER, 40, COHORT).train_noise_multiplier
    assert charges(site)[0] == Charge(agreed.train_noise_multiplier, 4 / 1000, 1)


SETTINGS = {
    "none": {},
    "those of local training": {"d_steps_per_g_step": 1},
    "sigma": {**COHORT.settings(), "noise_multiplier": 0.0},
    "nobody": Cohort(0, 120).settings(),
    "fewer patients than the site": Cohort(1, 39).settings(),
    "fewer patients than the others have": Cohort(3, 59).settings(),
    "too many patients": Cohort(3, 10**8 + 1).settings(),
    "too many sites": Cohort(10**4 + 1, 10**7).settings(),
    "a float": {"cohort_sites": 3.0, "cohort_patients": 120},
    "a truth": {"cohort_sites": True, "cohort_patients": 120},
    "a text": {"cohort_sites": "3", "cohort_patients": 120},
    "NaN": {"cohort_sites": 3, "cohort_patients": float("nan")},
}


@pytest.mark.parametrize("how", SETTINGS)
def test_a_false_cohort_costs_nothing(site, how):
    reply = answer(site, dataclasses.replace(gradient_request(), settings=SETTINGS[how]))
    assert reply.refusal in CHEAP_CODES
    assert (charges(site), released(site), list(site.home.replies.iterdir())) == ([], (), [])


HOSTILE = {
    **{f"weights: {name}": change for name, change in WEIGHTS.items() if name != "one missing"},
    "weights of G too": lambda request: dataclasses.replace(request, arrays=train_request().arrays),
    "one missing": lambda request: dataclasses.replace(
        request, arrays={name: array for name, array in request.arrays.items() if name != BIAS}
    ),
    "more steps than one": lambda request: changed(request, "train", steps_per_round=2),
    "a ladder": lambda request: changed(request, "train", d_steps_per_g_step="adaptive"),
    "a robust rule": lambda request: changed(request, "server", aggregation="median"),
    "as many colluding as there are": lambda request: changed(request, "privacy", colluding_sites=3),
    "colluding below nobody": lambda request: changed(request, "privacy", colluding_sites=-1),
    "a batch that fits no integer": lambda request: changed(request, "privacy", batch_patients=16_384),
    "round 0": lambda request: dataclasses.replace(request, round=0),
    "a round too many": lambda request: dataclasses.replace(request, round=99),
    "of a run that trains locally": lambda request: dataclasses.replace(request, proposal=PROPOSAL.proposal()),
    "over the policy's epsilon": lambda request: changed(request, "privacy", epsilon=8.1),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_request_costs_nothing(site, how):
    reply = answer(with_policy(site, max_sample_rate=1.0), HOSTILE[how](gradient_request()))
    assert reply.refusal in CHEAP_CODES
    assert (charges(site), released(site)) == ([], ())


def test_local_training_is_refused_in_a_run_of_secure_sum(site):
    request = dataclasses.replace(train_request(), proposal=TOGETHER.proposal())
    assert answer(site, request).refusal is RefusalCode.BAD_REQUEST
    assert charges(site) == []


@pytest.mark.parametrize("number", [0, 1])
def test_a_deployed_site_adds_all_of_the_noise_itself(site, number):
    """Nothing hides the share of a single site, so a share with part of the noise is refused before it is charged."""
    request = gradient_request(proposal=colluding(number))
    assert answer(site, request).refusal is RefusalCode.POLICY
    assert (charges(site), released(site)) == ([], ())
    assert answer(with_policy(site, allow_unmasked_shares=True), request).refusal is None


@pytest.mark.parametrize("ask", [gradient_request, warmup_request])
def test_no_unmasked_shares(tiny_home, ask):
    """A policy that a simulation left behind voids no guarantee: with a coordinator the key counts for nothing."""
    pin(tiny_home)
    joined = with_policy(open_site(tiny_home, coordinator=COORDINATOR.verify_key), allow_unmasked_shares=True)
    request = ask(proposal=colluding(0))
    request = dataclasses.replace(request, settings={**request.settings, **COHORT.settings()})
    sealed = seal_request(COORDINATOR, request, int(time.time()) + 60, joined.key.verify_key)
    assert answer(joined, sealed).refusal is RefusalCode.POLICY
    assert charges(joined) == []
    alone = with_policy(open_site(tiny_home), allow_unmasked_shares=True)
    assert answer(alone, request).refusal is None


def test_a_deployed_site_takes_part_where_all_others_may_collude(site):
    assert answer(site, gradient_request(proposal=colluding(2))).refusal is None


@pytest.mark.parametrize("bounds", [{"max_sample_rate": 0.03}, {"min_noise_multiplier": 50.0}, {"max_reply_bytes": 99}])
def test_the_policy_binds_before_the_charge(site, bounds):
    assert answer(with_policy(site, **bounds), gradient_request()).refusal is RefusalCode.POLICY
    assert (charges(site), released(site)) == ([], ())


def warmup_of(site, proposal=TOGETHER, cohort=COHORT):
    request = warmup_request(proposal=proposal)
    return answer(site, dataclasses.replace(request, settings={"look": "public", **cohort.settings()}))


def test_a_warm_up_of_all_sites_together_is_whole_numbers(site):
    reply = warmup_of(site)
    assert reply.arrays["embedding"].dtype == np.int32
    check_egress(reply, release_schema(Kind.WARMUP, {"embedding": reply.arrays["embedding"].shape}, "int32"))
    assert charges(site) == [plan(TOGETHER, 40, COHORT).charge_of_warmup()]


@pytest.mark.parametrize(("number", "parts"), [("all", 1), (2, 1), (1, 2), (0, 3)])
def test_a_warm_up_has_a_part_of_the_noise_and_is_charged_for_all_of_it(site, number, parts):
    """Two classes of 5,929 coordinates; the patients' sum, of length 40 at most, hardly shows in their deviation."""
    tree = colluding(number).model_dump(mode="json")
    tree["privacy"]["epsilon"] = 0.5
    proposal = type(TOGETHER).model_validate(tree)
    reply = warmup_of(with_policy(site, allow_unmasked_shares=True), proposal)
    full = plan(proposal, 40, COHORT).charge_of_warmup()
    assert charges(site) == [full]
    deviation = (reply.arrays["embedding"] * WARMUP_GRID).std()
    assert deviation == pytest.approx(full.noise_multiplier / parts**0.5, rel=0.03)


def test_shares_of_a_warm_up_are_refused_where_nothing_hides_them(site):
    assert warmup_of(site, colluding(0)).refusal is RefusalCode.POLICY
    assert charges(site) == []


@pytest.mark.parametrize("settings", [{"look": "public"}, {**COHORT.settings()}, {"look": "public", "cohort_sites": 3}])
def test_a_warm_up_of_all_together_without_a_cohort_costs_nothing(site, settings):
    request = dataclasses.replace(warmup_request(proposal=TOGETHER), settings=settings)
    assert answer(site, request).refusal is RefusalCode.BAD_REQUEST
    assert charges(site) == []


def test_a_warm_up_at_a_site_alone_takes_no_cohort(site):
    request = warmup_request()
    request = dataclasses.replace(request, settings={**request.settings, **COHORT.settings()})
    assert answer(site, request).refusal is RefusalCode.BAD_REQUEST
    assert charges(site) == []


def test_a_site_that_will_refuse_the_rounds_refuses_their_warm_up(site):
    assert warmup_of(with_policy(site, max_sample_rate=0.01)).refusal is RefusalCode.POLICY
    assert charges(site) == []
