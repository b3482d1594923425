"""A hostile coordinator against the agent: refused or harmless, always paid for, and nothing but a code comes back.

What it sends stands in tests/hostile_requests; over a socket and with two agents: tests/e2e/test_hostile_coordinator.
"""

import dataclasses
import logging

import numpy as np
import pytest

from client import agent, journal
from client import policy as policies
from client.agent import answer, open_site
from client.channel import pack_reply, unpack_request
from client.ledger import read_ledger
from common.config import Proposal
from common.errors import RefusalCode, WireError
from common.messages import Reply
from common.plan import plan
from tests.hostile_requests import (
    D_STEPS,
    FRAMES,
    HOSTILE_LENSES,
    NOT_ON_THE_SOCKET,
    RUN_IDS,
    TRAIN,
    WARMUP,
    all_weights,
    changed,
    make_lens,
    proposing,
)
from tests.tiny_site import PROPOSAL, train_request, warmup_request

CHEAP_CODES = (RefusalCode.POLICY, RefusalCode.BAD_REQUEST, RefusalCode.NO_DATA)


@pytest.fixture
def site(tiny_home):
    """Open a site, and hold its books to the law when the test is over, whatever was asked."""
    yield open_site(tiny_home)
    audit(tiny_home)


def audit(home):
    site = open_site(home)
    charged = [(e.request.run_id, e.request.round, e.request.kind) for e in site.ledger.entries]
    released = [(e.run_id, e.round, e.kind) for e in journal.entries(home.journal, site.key.verify_key)]
    assert len(set(charged)) == len(charged)
    assert len(set(released)) == len(released)
    assert set(released) <= set(charged)
    assert site.ledger.spent(site.policy.delta) <= site.policy.max_epsilon


def charged(site):
    return len(read_ledger(site.home.ledger, site.key.verify_key).entries)


def released(site):
    return journal.entries(site.home.journal, site.key.verify_key)


def assert_refused(reply, request, *codes):
    assert reply.refusal in codes
    assert reply == Reply(request.kind, request.run_id, request.round, reply.refusal)


def assert_costs_nothing(site, request):
    assert_refused(answer(site, request), request, *CHEAP_CODES)
    assert (charged(site), released(site), list(site.home.replies.iterdir())) == (0, (), [])


@pytest.mark.parametrize("how", TRAIN)
def test_codes_only_and_no_charge_for_a_hostile_round(site, how):
    assert_costs_nothing(site, TRAIN[how](train_request()))


def test_a_proposal_of_thousands_of_faults_fills_no_log(site, caplog):
    caplog.set_level(logging.WARNING, "fedmedgan.agent")
    for how in ("6,000 unknown keys", "4,000 unknown keys in a section", "1 MB"):
        assert_costs_nothing(site, TRAIN[f"proposal: {how}"](train_request()))
    assert len(caplog.messages) == 3
    assert max(map(len, caplog.messages)) < 4000


@pytest.mark.parametrize("how", NOT_ON_THE_SOCKET)
def test_codes_only_and_no_charge_for_foreign_dtypes(site, how):
    assert_costs_nothing(site, NOT_ON_THE_SOCKET[how](train_request()))


@pytest.mark.parametrize("how", WARMUP)
def test_codes_only_and_no_charge_for_a_hostile_warmup(site, how):
    assert_costs_nothing(site, WARMUP[how](warmup_request()))


@pytest.mark.parametrize("how", HOSTILE_LENSES)
def test_a_lens_made_to_overflow_has_one_paid_outcome_at_the_price_of_the_plan(site, how):
    """It is finite, so it is looked through; what comes of it is bounded, noisy, finite and paid for once."""
    request = dataclasses.replace(
        warmup_request(), settings={"look": "learned"}, arrays=HOSTILE_LENSES[how](make_lens())
    )
    first = answer(site, request)
    assert first.refusal is None
    (charge,) = site.ledger.charges
    assert charge == plan(PROPOSAL, 40).charge_of_warmup()
    embedding = first.arrays["embedding"].astype(np.float64)
    assert np.isfinite(embedding).all()
    noise = charge.noise_multiplier * np.sqrt(embedding.size)
    assert 0.9 * noise < np.linalg.norm(embedding) < 1.1 * noise + 40  # forty patients, each of length 1 at most
    assert pack_reply(answer(open_site(site.home), request)) == pack_reply(first)
    assert charged(site) == 1


@pytest.mark.parametrize("run_id", RUN_IDS, ids=lambda run_id: ascii(run_id[:20]))
def test_codes_only_and_no_charge_for_a_hostile_run_id(site, run_id):
    before = sorted(site.home.folder.parent.rglob("*"))
    for request in (train_request(run_id=run_id), warmup_request(run_id)):
        assert_costs_nothing(site, request)
    assert set(site.home.folder.parent.rglob("*")) - set(before) <= {site.home.folder / "agent.lock"}


@pytest.mark.parametrize("d_steps", D_STEPS, ids=lambda d_steps: repr(d_steps)[:20])
def test_codes_only_and_no_charge_for_hostile_d_steps(site, d_steps):
    settings = {} if d_steps is None else {"d_steps_per_g_step": d_steps}
    assert_costs_nothing(site, dataclasses.replace(train_request(), settings=settings))


@pytest.mark.parametrize("how", FRAMES)
def test_a_hostile_frame_does_not_decode(how):
    with pytest.raises(WireError):
        unpack_request(FRAMES[how])


LOUD = {
    "all of them the largest": lambda array: np.full_like(array, 3.4e38),
    "all of them the least": lambda array: np.full_like(array, -3.4e38),
    "signs that alternate": lambda array: (3.4e38 * (-1.0) ** np.arange(array.size)).astype("f4").reshape(array.shape),
    "nothing": np.zeros_like,
    "negative nothing": lambda array: np.full_like(array, -0.0),
    "denormal": lambda array: np.full_like(array, 1e-45),
    "denormal and loud": lambda array: np.resize(np.array([1e-45, 3.4e38, -1e-45], "f4"), array.shape),
    "a squared sum that overflows": lambda array: np.full_like(array, 2e19),
}


@pytest.mark.parametrize("how", LOUD)
def test_weights_made_to_overflow_have_one_paid_outcome(site, how):
    """They are finite, so they are taken; released or refused, it is charged and there is no second try."""
    request = all_weights(LOUD[how])(train_request())
    first = answer(site, request)
    assert first.refusal in (None, RefusalCode.INTERNAL)
    if first.refusal is not None:
        assert_refused(first, request, RefusalCode.INTERNAL)
    assert all(np.isfinite(array).all() for array in first.arrays.values())
    assert [entry.size_bytes > 0 for entry in released(site)] == [first.refusal is None]
    assert pack_reply(answer(open_site(site.home), request)) == pack_reply(first)
    assert charged(site) == 1


def test_weights_in_another_order_of_memory_are_the_same_request(site):
    first = answer(site, train_request())
    assert first.refusal is None
    assert pack_reply(answer(site, all_weights(np.asfortranarray)(train_request()))) == pack_reply(first)
    assert charged(site) == 1


SAME_ROUND = {
    "other weights": all_weights(lambda array: array + np.float32(1e-3)),
    "the same weights but for the sign of nothing": all_weights(lambda array: np.where(array == 0, -array, array)),
    "another setting": lambda r: dataclasses.replace(r, settings={"d_steps_per_g_step": 2}),
    "another spelling": lambda r: dataclasses.replace(
        r, proposal=Proposal.model_validate_json(r.proposal).model_dump_json(indent=1)
    ),
    "another clip norm": proposing("privacy", max_grad_norm=99.0),
    "less privacy": proposing("privacy", epsilon=7.9),
    "fewer rounds": proposing("federation", rounds=1),
    "another seed": proposing("federation", seed=1),
}


@pytest.mark.parametrize("gone", [False, True], ids=["reply stored", "reply gone"])
def test_another_request_for_a_round_that_was_answered_is_a_replay(site, gone):
    answer(site, train_request())
    for path in site.home.replies.iterdir() if gone else ():
        path.unlink()
    for change in SAME_ROUND.values():
        request = change(train_request())
        assert_refused(answer(site, request), request, RefusalCode.REPLAYED)
    assert (charged(site), len(released(site))) == (1, 1)


@pytest.mark.parametrize("how", SAME_ROUND)
def test_another_request_for_a_round_that_failed_is_a_replay(site, how, monkeypatch):
    """The agent ends right after the charge; what was charged cannot be had for another question."""

    def end(*_):
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(agent, "_release", end)
        with pytest.raises(SystemExit):
            answer(open_site(site.home), train_request())
    request = SAME_ROUND[how](train_request())
    assert_refused(answer(site, request), request, RefusalCode.REPLAYED)
    assert (charged(site), released(site)) == (1, ())


def test_a_second_warmup_with_another_share_is_a_replay(site):
    assert answer(site, warmup_request()).refusal is None
    for share in (0.1, 0.51, 0.9):
        request = changed(warmup_request(), "warmup", share=share)
        assert_refused(answer(site, request), request, RefusalCode.REPLAYED)
    assert (charged(site), len(released(site))) == (1, 1)


@pytest.mark.slow
def test_a_proposal_that_changes_in_mid_run_pays_for_what_it_asks(site):
    """Every round is priced by its own proposal: a plan of many rounds lends nothing to a run that stops after one."""
    changes = (
        {},
        {"privacy": {"epsilon": 4.0}},
        {"train": {"steps_per_round": 5}},
        {"privacy": {"batch_patients": 8, "images_per_patient": 50}},
        {"privacy": {"max_grad_norm": 100.0}, "train": {"steps_per_round": 1}},
        {"warmup": {"share": 0.0}, "federation": {"rounds": 6}},
    )
    for number, sections in enumerate(changes, start=1):
        request = changed(train_request(number), "federation", rounds=max(number, 3))
        for section, values in sections.items():
            request = changed(request, section, **values)
        before = site.ledger.spent(1e-5)
        reply = answer(site, request)
        assert reply.refusal in (None, RefusalCode.OVER_BUDGET)
        assert (site.ledger.spent(1e-5) > before) == (reply.refusal is None)
        audit(site.home)


def test_many_runs_that_stop_at_once_drain_the_budget_and_no_more(site):
    """Each run plans three rounds and takes one; what is over budget once is over budget for every run that follows."""
    asked = [make(run_id=f"run-{n}") for n in range(8) for make in (warmup_request, train_request)]
    replies = [answer(site, request) for request in asked]
    granted = [reply for reply in replies if reply.refusal is None]
    assert {reply.refusal for reply in replies} == {None, RefusalCode.OVER_BUDGET}
    assert {reply.refusal for reply in replies[-4:]} == {RefusalCode.OVER_BUDGET}
    assert (charged(site), len(released(site))) == (len(granted), len(granted))
    assert 7.0 < site.ledger.spent(1e-5) == max(reply.fields["epsilon_spent"] for reply in granted)


@pytest.mark.parametrize("epsilon", [5e-324, 1e-9])
def test_an_epsilon_of_next_to_nothing_buys_next_to_nothing(site, epsilon):
    """At delta = 1e-5 noise of about 1e5 clip norms costs an epsilon of zero: granted, written down, worthless."""
    for number in range(5):
        reply = answer(site, changed(train_request(run_id=f"run-{number}"), "privacy", epsilon=epsilon))
        assert reply.refusal in (None, RefusalCode.BAD_REQUEST)
    assert all(charge.noise_multiplier > 1e4 for charge in site.ledger.charges)
    assert charged(site) == len(released(site))


@pytest.mark.slow
def test_a_sample_rate_of_one_is_refused_or_paid_for(site):
    """Everybody in every step: a policy may forbid it, and one that does not charges what it costs."""
    bounds = site.policy.model_dump()
    for name in ("careful", "careless"):
        policy = type(site.policy).model_validate(bounds | ({} if name == "careful" else {"max_sample_rate": 1.0}))
        requests = [warmup_request(name), *(train_request(number, name) for number in (1, 2, 3))]
        asked = [changed(request, "privacy", batch_patients=4000) for request in requests]
        policies.save(site.home.policy, policy)
        codes = {answer(site, request).refusal for request in asked}
        assert codes == {RefusalCode.POLICY if name == "careful" else None}
    assert {charge.sample_rate for charge in site.ledger.charges} == {1.0}
    assert charged(site) == 4
