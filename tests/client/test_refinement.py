"""Releases of the warm-up after the first: charged and journaled one by one, in their rounds only, read strictly."""

import numpy as np
import pytest

from client import journal
from client.agent import answer, open_site
from common.errors import RefusalCode
from common.lens import to_arrays
from common.look import look_dims
from common.messages import Kind, Request
from common.plan import plan
from tests.common.test_lens import make_lens
from tests.hostile_requests import changed
from tests.tiny_site import POLICY, train_request, warmup_request


@pytest.fixture
def site(tiny_home):
    return open_site(tiny_home)


@pytest.fixture
def proposal(tiny_proposal):
    warmup = tiny_proposal.warmup.model_copy(update={"refinements": 2})
    return tiny_proposal.model_copy(update={"warmup": warmup})


def refinement(proposal, number=1, look="means", arrays=None) -> Request:
    lens = to_arrays(make_lens("means")) if arrays is None else arrays
    return Request(Kind.WARMUP, "run-1", number, proposal.proposal(), {"look": look}, lens)


def books(site):
    entries = journal.entries(site.home.journal, site.key.verify_key)
    return len(open_site(site.home).ledger.entries), [(entry.kind, entry.round) for entry in entries]


def test_each_release_is_charged_once_and_journaled_as_its_own_round(site, proposal):
    first = answer(site, warmup_request(proposal=proposal))
    second = answer(site, refinement(proposal))
    again = answer(site, refinement(proposal))
    assert first.arrays["embedding"].shape == (2, look_dims(proposal.image)["public"])
    assert second.arrays["embedding"].shape == (2, 65)
    assert np.array_equal(second.arrays["embedding"], again.arrays["embedding"])
    assert books(site) == (2, [(Kind.WARMUP, 0), (Kind.WARMUP, 1)])
    assert second.fields["epsilon_spent"] > first.fields["epsilon_spent"]


def test_all_releases_together_cost_their_share(site, proposal):
    answer(site, warmup_request(proposal=proposal))
    replies = [answer(site, refinement(proposal, number)) for number in (1, 2)]
    assert replies[-1].fields["epsilon_spent"] <= proposal.warmup.share * proposal.privacy.epsilon
    assert replies[-1].fields["epsilon_spent"] > 0.97 * proposal.warmup.share * proposal.privacy.epsilon
    one = plan(proposal.model_copy(update={"warmup": proposal.warmup.model_copy(update={"refinements": 0})}), 40)
    assert plan(proposal, 40).warmup_noise_multiplier == pytest.approx(3**0.5 * one.warmup_noise_multiplier, rel=0.02)


def test_a_learned_lens_is_answered(site, proposal):
    arrays = to_arrays(make_lens("learned"))
    reply = answer(site, refinement(proposal, look="learned", arrays=arrays))
    assert reply.arrays["embedding"].shape == (2, look_dims(proposal.image)["learned"])


def test_rounds_have_their_kind(site, proposal):
    wrong = [refinement(proposal, 3), refinement(proposal, -1), train_request(1, proposal=proposal)]
    wrong.append(train_request(2, proposal=proposal))
    for request in wrong:
        assert answer(site, request).refusal is RefusalCode.BAD_REQUEST
    assert books(site) == (0, [])
    assert answer(site, train_request(3, proposal=proposal)).refusal is None


def test_another_lens_for_the_same_round_is_a_replay(site, proposal):
    answer(site, refinement(proposal))
    arrays = {name: array + 1 for name, array in to_arrays(make_lens("means")).items()}
    assert answer(site, refinement(proposal, arrays=arrays)).refusal is RefusalCode.REPLAYED
    assert books(site) == (1, [(Kind.WARMUP, 1)])


@pytest.mark.parametrize(
    ("look", "spoil"),
    [
        ("public", lambda arrays: None),  # the public map takes no arrays
        ("learned", lambda arrays: None),
        ("means", lambda arrays: arrays.pop("lens.scale")),
        ("means", lambda arrays: arrays["lens.centre"].fill(np.nan)),
        ("means", lambda arrays: arrays.update({"lens.centre": np.zeros((2, 10_000), np.float32)})),
        ("fine", lambda arrays: None),
        (1, lambda arrays: None),
    ],
)
def test_a_lens_that_does_not_decode_costs_nothing(site, proposal, look, spoil):
    arrays = {name: array.copy() for name, array in to_arrays(make_lens("means")).items()}
    spoil(arrays)
    assert answer(site, refinement(proposal, look=look, arrays=arrays)).refusal is RefusalCode.BAD_REQUEST
    assert books(site) == (0, [])


@pytest.mark.parametrize("fill", [0.0, 1e38, -1e38])
def test_a_hostile_lens_gets_what_the_noise_lets_out(site, proposal, fill):
    arrays = {name: np.full_like(array, fill) for name, array in to_arrays(make_lens("learned")).items()}
    reply = answer(site, refinement(proposal, look="learned", arrays=arrays))
    assert reply.refusal is None
    std = plan(proposal, POLICY.declared_patients).warmup_noise_multiplier
    largest = np.abs(reply.arrays["embedding"]).max()
    assert largest < POLICY.declared_patients + 8 * std


def test_more_refinements_than_a_configuration_may_hold_are_refused(site, proposal):
    request = changed(warmup_request(proposal=proposal), "warmup", refinements=17)
    assert answer(site, request).refusal is RefusalCode.BAD_REQUEST
    assert books(site) == (0, [])
