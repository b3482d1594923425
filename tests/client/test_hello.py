"""What a site answers to a hello: every verdict, what it costs, and what it may depend on."""

import dataclasses

import pytest

from client import journal
from client import policy as policies
from client.agent import answer, open_site
from client.budget import forecast
from client.ledger import ChargeRequest, read_ledger
from common.errors import RefusalCode
from common.greeting import CAPABILITIES, Verdict, hello_settings, parse_greeting
from common.messages import PACKAGE_VERSION, PROTOCOL_VERSION, Kind, Request
from common.privacy import Charge, noise_for
from tests.tiny_site import COHORT, POLICY, PROPOSAL, REFINED, TOGETHER, make_weights, train_request, warmup_request

HELLO = Request(Kind.HELLO, "run-1", 0, PROPOSAL.proposal(), hello_settings())


@pytest.fixture
def site(tiny_home):
    return open_site(tiny_home)


def hello(proposal=PROPOSAL, run_id="run-1"):
    return dataclasses.replace(HELLO, proposal=proposal.proposal(), run_id=run_id)


def said(site, request=HELLO):
    reply = answer(site, request)
    assert (reply.refusal, dict(reply.arrays)) == (None, {})
    return parse_greeting(reply.fields)


def verdict(site, request=HELLO):
    found = said(site, request)
    return found.verdict, found.rounds_allowed


def with_policy(site, **bounds):
    policies.save(site.home.policy, site.policy.model_copy(update=bounds))
    return site


def changed(**sections):
    tree = PROPOSAL.model_dump(mode="json")
    for name, values in sections.items():
        tree[name] |= values
    return type(PROPOSAL).model_validate(tree)


def spend(site, target, run_id="earlier"):
    charge = Charge(noise_for(target, POLICY.delta, 1.0, 1), 1.0, 1)
    site.ledger.charge(ChargeRequest(run_id, 0, Kind.WARMUP, "digest"), charge, POLICY.max_epsilon, POLICY.delta)


def charged(site):
    return len(read_ledger(site.home.ledger, site.key.verify_key).entries)


def test_a_hello_says_exactly_this(site):
    assert dict(answer(site, HELLO).fields) == {
        "site": "st-mary",
        "declared_patients": 40,
        "protocol": PROTOCOL_VERSION,
        "package": PACKAGE_VERSION,
        "proposal_sha256": PROPOSAL.digest(),
        "capabilities": CAPABILITIES,
        "verdict": "ok",
        "rounds_allowed": 4,  # round 0 of the warm-up and three
    }


def test_costs_nothing(site):
    def books():
        return {path: path.read_bytes() for path in site.home.folder.rglob("*") if path.is_file()}

    before = books()
    for request in (HELLO, hello(TOGETHER), hello(REFINED), dataclasses.replace(HELLO, proposal="{}")):
        said(site, request)
    assert books() == before
    assert (charged(site), journal.entries(site.home.journal, site.key.verify_key)) == (0, ())


def test_nothing_of_patients(site):
    before = [said(site, request) for request in (HELLO, hello(TOGETHER))]
    for path in site.home.folder.glob("dataset-*"):
        path.write_bytes(b"not a single patient")
    assert [said(site, request) for request in (HELLO, hello(TOGETHER))] == before


@pytest.mark.parametrize("spent", [4.0, 6.0, 7.0])
def test_over_budget_says_for_how_many_rounds_it_is_enough(site, spent):
    """The count is what the ledger then takes, release by release."""
    spend(site, spent)
    found, allowed = verdict(site)
    assert found is Verdict.OVER_BUDGET
    taken = 0
    for request in (warmup_request(), *(train_request(number) for number in (1, 2, 3))):
        if answer(site, request).refusal is RefusalCode.OVER_BUDGET:
            break
        taken += 1
    assert allowed == taken < 4


def test_without_a_warm_up_rounds_are_counted_from_the_first(site):
    assert verdict(site, hello(changed(warmup={"share": 0.0}))) == (Verdict.OK, 3)


def test_a_budget_that_does_not_reach_the_warm_up_is_enough_for_nothing(site):
    spend(site, 7.9)
    assert verdict(site) == (Verdict.OVER_BUDGET, 0)


def test_own_run_is_not_paid_twice(site):
    """Greeted again when all of it is spent: a relay or a coordinator that comes back must not end its own run."""
    requests = [warmup_request(), *(train_request(number) for number in (1, 2, 3))]
    for request in requests:
        assert answer(site, request).refusal is None
        assert verdict(site) == (Verdict.OK, 4)
    assert verdict(site, hello(run_id="run-2")) == (Verdict.OVER_BUDGET, 0)


@pytest.mark.parametrize(
    ("bounds", "sections"),
    [
        ({"max_rounds": 2}, {}),
        ({"allowed_models": ("dcgan",)}, {}),
        ({"max_sample_rate": 0.09}, {}),
        ({"min_noise_multiplier": 50.0}, {}),
        ({"max_reply_bytes": 100}, {}),
        ({}, {"privacy": {"epsilon": 8.1}}),
        ({}, {"privacy": {"delta": 1e-6}}),
        ({}, {"privacy": {"min_patients": 41}}),
    ],
)
def test_what_the_policy_refuses_is_policy(site, bounds, sections):
    strict, request = with_policy(site, **bounds), hello(changed(**sections))
    assert verdict(strict, request) == (Verdict.POLICY, 0)
    real = dataclasses.replace(train_request(), proposal=request.proposal)
    assert answer(strict, real).refusal is RefusalCode.POLICY  # the request itself is refused alike


@pytest.mark.parametrize("image", [{"size": 32}, {"channels": 3}, {"classes": ["opacity", "clear"]}])
def test_images_that_are_not_imported_are_no_data(site, image, caplog):
    caplog.set_level("INFO")
    assert verdict(site, hello(changed(image=image))) == (Verdict.NO_DATA, 0)
    assert "fedmedgan-site import" in caplog.text


UNREADABLE = {
    "empty": "",
    "not JSON": "{" * 1000,
    "huge": "{" * 10**6,
    "a key of a later release": PROPOSAL.proposal().replace('"seed":0', '"seed":0,"later":1'),
    "a model of a later release": PROPOSAL.proposal().replace('"mlp"', '"diffusion"'),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_proposal_that_does_not_read_is_told_with_the_versions(site, what):
    found = said(site, dataclasses.replace(HELLO, proposal=UNREADABLE[what]))
    assert (found.verdict, found.rounds_allowed, found.proposal_sha256) == (Verdict.BAD_REQUEST, 0, "")
    assert (found.protocol, found.package) == (PROTOCOL_VERSION, PACKAGE_VERSION)


def test_a_proposal_that_cannot_be_planned_is_a_bad_request(site):
    crowd = TOGETHER.model_copy(update={"federation": TOGETHER.federation.model_copy(update={"min_sites": 10**7})})
    for proposal in (changed(image={"classes": []}), crowd):
        found = said(site, hello(proposal))
        assert (found.verdict, found.proposal_sha256) == (Verdict.BAD_REQUEST, proposal.digest())


def test_secure_sum_is_told_from_the_smallest_cohort(site):
    assert verdict(site, hello(TOGETHER)) == (Verdict.OK, 4)
    spend(site, 6.0)
    found, allowed = verdict(site, hello(TOGETHER))
    assert found is Verdict.OVER_BUDGET
    real = forecast(site.policy, site.ledger.entries, TOGETHER, COHORT)
    assert abs(allowed - real.in_order) <= 1


HOSTILE = {
    "no release": {"settings": {}},
    "more than a release": {"settings": {**hello_settings(), "look": "public"}},
    "a long release": {"settings": {"package": "1" * 33}},
    "a release with lines": {"settings": {"package": "1.0\nroot: all is well"}},
    "a release that is a number": {"settings": {"package": 1}},
    "arrays": {"arrays": make_weights()},
    "a round": {"round": 1},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hello_with_anything_else_in_it_is_refused(site, what):
    reply = answer(site, dataclasses.replace(HELLO, **HOSTILE[what]))
    assert (reply.refusal, dict(reply.fields), dict(reply.arrays)) == (RefusalCode.BAD_REQUEST, {}, {})
    assert charged(site) == 0


def test_the_log_tells_the_hospital_what_was_answered(site, caplog):
    caplog.set_level("INFO", "fedmedgan.agent")
    said(with_policy(site, max_rounds=2), hello(run_id="run-1\n\x1b[2J" + "x" * 10**5))
    change, line = (record.getMessage() for record in caplog.records)
    assert change.endswith("max_rounds: 500 -> 2")
    assert f"fedmedgan {PACKAGE_VERSION} (here {PACKAGE_VERSION}): policy, 0 of 4 rounds" in line
    assert "max_rounds" in line
    assert line.isprintable()
    assert len(line) < 10_000


def test_the_log_tells_the_hospital_that_the_budget_is_too_small(site, caplog):
    spend(site, 7.9)
    caplog.set_level("INFO", "fedmedgan.agent")
    assert said(site, hello()).verdict is Verdict.OVER_BUDGET
    (line,) = [record.getMessage() for record in caplog.records]
    assert "nothing to mend" not in line
    assert "for its warm-up alone, and 7.9" in line
    assert "of max_epsilon = 8 of policy.toml is spent" in line


def test_the_log_tells_what_the_whole_run_costs_where_only_its_rounds_are_too_dear(site, caplog):
    spend(site, 3.0)
    caplog.set_level("INFO", "fedmedgan.agent")
    greeting = said(site, hello())
    assert greeting.verdict is Verdict.OVER_BUDGET
    assert greeting.rounds_allowed > 0
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the run costs epsilon" in line
    assert "and 3." in line


def test_shared_noise_is_refused_at_the_handshake(site):
    """Not only when noise is to be added: by then the coordinator has told everybody that the site joins."""
    shared = hello(changed(train={"algorithm": "secure-sum", "steps_per_round": 1}, privacy={"colluding_sites": 1}))
    assert verdict(site, shared)[0] is Verdict.POLICY
    assert verdict(with_policy(site, allow_unmasked_shares=True), shared)[0] is Verdict.OK
