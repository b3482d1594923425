"""The agent: its order of work, its refusals, its memory. Hostile requests: test_hostile_coordinator."""

import dataclasses
import fcntl
import math
import shutil
import threading

import numpy as np
import pytest
import torch

from client import journal, replies
from client import policy as policies
from client.agent import answer, open_site
from client.channel import pack_reply
from client.home import import_images, load_images
from client.journal import check_egress, release_schema
from client.ledger import ChargeRequest, read_ledger
from common.config_text import parse_proposal
from common.crypto import KeyStream, SigningKey
from common.errors import IntakeError, RefusalCode, StorageError, WireError
from common.features import feature_dim, feature_map
from common.greeting import hello_settings
from common.look import look_dims
from common.messages import Kind, Reply, Request, size_bytes
from common.models import build
from common.plan import plan
from common.privacy import Charge, epsilon, noise_for
from common.seal import check_reply, content_digest, request_digest, seal_request
from common.weights import for_transport, get_weights
from tests.hostile_requests import BAD_LENSES, HOSTILE_LENSES, bad_lens, changed, make_lens
from tests.pinned import COORDINATOR, pin
from tests.tiny_site import REFINED, train_request

BUDGET = {"epsilon_spent", "epsilon_allowed"}


@pytest.fixture(scope="module")
def weights(tiny_proposal):
    return get_weights(build(tiny_proposal.model, tiny_proposal.image, 2, torch.Generator().manual_seed(3)))


@pytest.fixture
def site(tiny_home):
    return open_site(tiny_home)


@pytest.fixture
def warmup(tiny_proposal):
    return Request(Kind.WARMUP, "run-1", 0, tiny_proposal.proposal(), {"look": "public"})


@pytest.fixture
def train(tiny_proposal, weights):
    return Request(Kind.TRAIN, "run-1", 1, tiny_proposal.proposal(), {"d_steps_per_g_step": 1}, weights)


def charged(site):
    return len(read_ledger(site.home.ledger, site.key.verify_key).entries)


def released(site):
    return journal.entries(site.home.journal, site.key.verify_key)


def assert_refused(reply, code):
    assert reply.refusal is code
    assert dict(reply.fields) == {}
    assert dict(reply.arrays) == {}


def dataset_of(site, proposal):
    return site.home.vault(proposal.image.classes, proposal.image.size) / "pixels-00000"


def test_what_a_warmup_carries(site, warmup):
    reply = answer(site, warmup)
    shape = (2, feature_dim(feature_map(28)))
    assert {name: (array.shape, str(array.dtype)) for name, array in reply.arrays.items()} == {
        "embedding": (shape, "float32")
    }
    assert set(reply.fields) == BUDGET
    check_egress(reply, release_schema(Kind.WARMUP, {"embedding": shape}))
    assert reply.fields["epsilon_allowed"] == 8.0
    assert 0 < reply.fields["epsilon_spent"] <= 4.0


def test_what_a_round_carries(site, train, weights):
    reply = answer(site, train)
    assert set(reply.fields) == BUDGET | {"fake_accuracy", "d_steps_per_g_step"}
    check_egress(reply, release_schema(Kind.TRAIN, {name: array.shape for name, array in weights.items()}))
    assert set(reply.arrays) == set(weights)
    assert any((reply.arrays[name] != weights[name]).any() for name in weights if name.startswith("discriminator."))


def test_a_whole_run_costs_what_was_proposed(site, warmup, train):
    replies = [answer(site, warmup)]
    replies += [answer(site, dataclasses.replace(train, round=number)) for number in (1, 2, 3)]
    spent = [reply.fields["epsilon_spent"] for reply in replies]
    assert spent == sorted(spent)
    assert spent[-1] <= 8.0
    assert [entry.epsilon_after for entry in released(site)] == spent
    assert site.ledger.spent(1e-5) == spent[-1]


def refined(round_, kind=Kind.WARMUP, look="learned"):
    """Make an honest request of the run with one refinement."""
    if kind is Kind.TRAIN:
        return train_request(round_, proposal=REFINED)
    lens = {} if look == "public" else make_lens(REFINED.image, look)
    return Request(Kind.WARMUP, "run-1", round_, REFINED.proposal(), {"look": look}, lens)


@pytest.mark.parametrize("look", ["public", "means", "learned"])
def test_a_refinement_is_charged_once_and_journaled_as_its_own_round(site, look):
    first = answer(site, refined(0, look="public"))
    second = answer(site, refined(1, look=look))
    assert second.arrays["embedding"].shape == (2, look_dims(REFINED.image)[look])
    assert second.arrays["embedding"].dtype == np.float32
    assert set(second.fields) == BUDGET
    assert pack_reply(answer(open_site(site.home), refined(1, look=look))) == pack_reply(second)
    assert [(entry.round, entry.kind) for entry in released(site)] == [(0, Kind.WARMUP), (1, Kind.WARMUP)]
    assert [entry.sha256 for entry in released(site)] == [content_digest(first), content_digest(second)]
    assert [entry.request.round for entry in site.ledger.entries] == [0, 1]
    assert list(site.ledger.charges) == [plan(REFINED, 40).charge_of_warmup()] * 2
    assert 3.9 < second.fields["epsilon_spent"] <= 4.0


def test_a_whole_refined_run_costs_what_was_proposed(site):
    requests = [refined(0, look="public"), refined(1), *(refined(number, Kind.TRAIN) for number in (2, 3))]
    spent = [answer(site, request).fields["epsilon_spent"] for request in requests]
    assert spent == sorted(spent)
    assert 7.9 < spent[-1] <= 8.0
    assert [(entry.round, entry.epsilon_after) for entry in released(site)] == list(enumerate(spent))


@pytest.mark.parametrize(("number", "kind"), [(2, Kind.WARMUP), (3, Kind.WARMUP), (0, Kind.TRAIN), (1, Kind.TRAIN)])
def test_a_round_of_the_other_kind_is_refused_uncharged(site, number, kind):
    for before in (False, True):
        if before:
            answer(site, refined(0, look="public"))
        request = refined(number, kind)
        assert_refused(answer(site, request), RefusalCode.BAD_REQUEST)
        assert (charged(site), len(released(site))) == (before, before)


def test_another_lens_for_the_same_round_is_a_replay(site):
    request = refined(1)
    first = pack_reply(answer(site, request))
    others = [
        dataclasses.replace(request, arrays=HOSTILE_LENSES["a negative scale"](request.arrays)),
        refined(1, look="means"),
        refined(1, look="public"),
    ]
    for other in others:
        for again in (site, open_site(site.home)):
            assert_refused(answer(again, other), RefusalCode.REPLAYED)
    assert pack_reply(answer(site, request)) == first
    assert (charged(site), len(released(site))) == (1, 1)


@pytest.mark.parametrize("how", BAD_LENSES)
def test_a_lens_that_does_not_decode_costs_nothing(site, how):
    request = bad_lens(BAD_LENSES[how])(refined(1))
    assert_refused(answer(site, request), RefusalCode.BAD_REQUEST)
    assert (charged(site), released(site), list(site.home.replies.iterdir())) == (0, (), [])
    assert answer(site, refined(1)).refusal is None  # the round is still to be had


def test_images_that_were_never_imported_cost_nothing(site, warmup, train, tiny_proposal):
    shutil.rmtree(dataset_of(site, tiny_proposal).parent)
    for request in (warmup, train):
        assert_refused(answer(site, request), RefusalCode.NO_DATA)
    assert (charged(site), released(site)) == (0, ())


OTHER_FORMS = [{"channels": 3}, {"size": 32}, {"classes": ("clear", "nodule")}, {"classes": ("opacity", "clear")}]


@pytest.mark.parametrize("image", OTHER_FORMS)
def test_images_in_another_form_cost_nothing_and_the_log_says_how_to_mend_it(site, warmup, train, image, caplog):
    form = {"size": 28, "channels": 1, "classes": ("clear", "opacity")} | image
    for request in (warmup, train):
        caplog.clear()
        assert_refused(answer(site, changed(request, "image", **image)), RefusalCode.NO_DATA)
        names, colour = form["classes"], {1: "grey", 3: "colour"}[form["channels"]]
        asked = f"{form['size']} px in {colour} (classes {', '.join(names)})"
        assert (
            f"Expected imported images of {asked}, this site has 28 px in grey (classes clear, opacity)" in caplog.text
        )
        assert (
            f"fedmedgan-site import {site.home.folder} --classes {','.join(form['classes'])} --size {form['size']} "
            f"--channels {form['channels']}" in caplog.text
        )
    assert (charged(site), released(site)) == (0, ())


def test_names_from_a_message_neither_command_a_shell_nor_fill_the_log(site, warmup, caplog):
    hostile = changed(warmup, "image", classes=("a; rm -rf ~\x1b[2J\u202e\nline", "x" * 40_000))
    assert_refused(answer(site, hostile), RefusalCode.NO_DATA)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.isprintable()
    assert len(said) < 5000
    caplog.clear()
    answer(site, changed(warmup, "image", classes=("a; rm -rf ~", "b")))
    assert "--classes 'a; rm -rf ~,b' --size" in caplog.text


def test_a_warm_up_in_colour(site, warmup, tiny_proposal):
    import_images(site.home, tiny_proposal.image.classes, 28, 10, channels=3)
    coloured = changed(warmup, "image", channels=3)
    assert answer(site, coloured).arrays["embedding"].shape == (2, feature_dim(feature_map(28, 3)))
    assert charged(site) == 1
    refused = dataclasses.replace(coloured, run_id="run-2")
    assert_refused(answer(with_policy(site, allowed_channels=(1,)), refused), RefusalCode.POLICY)
    assert charged(site) == 1


def test_a_set_of_another_form_under_the_right_name_is_not_used(site, warmup, tiny_proposal):
    right = site.home.vault(tiny_proposal.image.classes, 28, 3)
    shutil.copytree(dataset_of(site, tiny_proposal).parent, right)
    reply = answer(site, changed(warmup, "image", channels=3))
    assert_refused(reply, RefusalCode.NO_DATA)
    with pytest.raises(IntakeError, match="the vault holds others"):
        load_images(site.home, tiny_proposal.image.classes, 28, 3)


@pytest.mark.parametrize("before", [7.0, 7.99])
def test_a_warm_up_over_what_is_left_is_refused_and_nothing_is_charged(site, warmup, before, caplog):
    noise = noise_for(before, 1e-5, 1.0, 1)
    site.ledger.charge(ChargeRequest("earlier", 1, Kind.TRAIN, "digest"), Charge(noise, 1.0, 1), 8.0, 1e-5)
    spent = site.ledger.spent(1e-5)
    assert_refused(answer(site, warmup), RefusalCode.OVER_BUDGET)
    assert (charged(site), released(site), site.ledger.spent(1e-5)) == (1, (), spent)
    assert f"{8.0 - spent:.4f} is left of the data set's budget ({spent:.4f} is spent)" in caplog.text
    alone = plan(parse_proposal(warmup.proposal), 40).charge_of_warmup()
    assert f"this charge alone asks for {epsilon([alone], 1e-5):.4f}" in caplog.text


def test_charged_first_even_if_the_data_do_not_read(site, warmup, train, tiny_proposal):
    dataset_of(site, tiny_proposal).write_bytes(b"damaged")
    for number, request in enumerate((warmup, train), start=1):
        assert answer(site, request).refusal in (RefusalCode.NO_DATA, RefusalCode.INTERNAL)
        assert charged(site) == number
    assert [entry.size_bytes for entry in released(site)] == [0, 0]  # outcomes, and nothing in them


class Killed(BaseException):
    """What no handler catches, as a kill."""


class KilledWhenUsed:
    """Dies when it is looked at, in the middle of training."""

    __hash__ = None

    def __eq__(self, other):
        raise Killed


def test_one_outcome_per_charge_from_a_secret_that_stands_before_it(tiny_home, train):
    """A secret is drawn for the very first charge alone, and stands on the disk before it."""

    def killed(_):
        raise Killed

    with pytest.raises(Killed):
        answer(open_site(tiny_home, killed), train)
    assert (charged(open_site(tiny_home)), list(tiny_home.replies.iterdir())) == (0, [])
    assert answer(open_site(tiny_home), train).refusal is None


def test_repeat_is_free_after_a_crash_in_training(tiny_home, train):
    def crash(purpose):
        raise ZeroDivisionError(purpose)

    with pytest.raises(Killed):
        answer(dataclasses.replace(open_site(tiny_home), gradients=KilledWhenUsed()), train)
    site = open_site(tiny_home, crash)  # a second secret is never drawn
    assert (charged(site), released(site)) == (1, ())
    assert answer(site, train).refusal is None
    assert (charged(site), len(released(site))) == (1, 1)


def test_one_outcome_per_charge(tiny_home, train):
    """An error in training and then the same request: the same patients are drawn, the same noise is added."""
    keys = []

    def secrets(digest):
        keys.append(digest)
        return KeyStream.from_os()

    site = open_site(tiny_home, secrets)
    path = dataset_of(site, parse_proposal(train.proposal))
    whole = path.read_bytes()
    path.write_bytes(b"damaged")
    first = answer(site, train)
    assert first.refusal is not None
    path.write_bytes(whole)
    assert answer(open_site(tiny_home, secrets), train).refusal == first.refusal  # stored: its one outcome
    assert len(keys) == 1
    assert charged(site) == 1


def test_one_outcome_per_charge_after_kill(tiny_home, train):
    """What a kill leaves is the charge and its secret; asked again, the answer is what it would have been."""

    def fixed(digest):
        return KeyStream(bytes(range(32))).derive(digest)

    def other(digest):
        raise AssertionError("a second secret was drawn for one charge")

    site = open_site(tiny_home, fixed)
    expected = content_digest(answer(site, train))
    reply = next(site.home.replies.glob("*.reply"))
    secret = fixed(reply.read_bytes().partition(b"\n")[0].decode()).read(32)
    reply.with_suffix(".secret").write_bytes(secret)
    reply.unlink()
    shutil.rmtree(site.home.journal)
    site.home.journal.mkdir()
    journal.start(site.home.journal, site.key)
    assert content_digest(answer(open_site(tiny_home, other), train)) == expected
    assert list(site.home.replies.glob("*.secret")) == []


def test_a_secret_does_not_outlive_its_outcome(site, train):
    """What a kill between the two leaves: the stored reply, and the secret of its noise beside it."""
    answer(site, train)
    (stored,) = site.home.replies.iterdir()
    stored.with_suffix(".secret").write_bytes(bytes(32))
    assert answer(site, train).refusal is None
    assert list(site.home.replies.iterdir()) == [stored]


def test_one_outcome_per_charge_when_the_journal_was_missed_and_rounds_went_on(tiny_home, train):
    """A kill between store and journal, two rounds more, and back: the same bytes, not a second draw."""
    site = open_site(tiny_home)
    before = {path.name: path.read_bytes() for path in site.home.journal.iterdir()}
    first = content_digest(answer(site, train))
    (site.home.journal / "journal.jsonl").unlink()
    for name, content in before.items():  # as if it had been killed before the journal's line
        (site.home.journal / name).write_bytes(content)
    for number in (2, 3):
        assert answer(open_site(tiny_home), dataclasses.replace(train, round=number)).refusal is None
    assert content_digest(answer(open_site(tiny_home), train)) == first
    assert sorted(entry.round for entry in released(site)) == [1, 2, 3]


@pytest.mark.parametrize("kept", ["replies", "journal", "neither"])
def test_one_outcome_per_charge_after_a_partial_restore(tiny_home, train, warmup, tmp_path, kept):
    """An older journal, older replies or both are put back, the newer ledger stays: no second output."""
    site = open_site(tiny_home)
    answer(site, warmup)
    for part in ("journal", "replies"):
        shutil.copytree(tiny_home.folder / part, tmp_path / "old" / part)
    first = answer(site, train)
    assert first.refusal is None
    for part in {"journal", "replies"} - {kept}:
        shutil.rmtree(tiny_home.folder / part)
        shutil.copytree(tmp_path / "old" / part, tiny_home.folder / part)
    for _ in range(2):
        again = answer(open_site(tiny_home), train)
        if kept == "replies":
            assert pack_reply(again) == pack_reply(first)
        else:
            assert_refused(again, RefusalCode.REPLAYED)
    assert charged(site) == 2


def test_a_refused_charge_leaves_no_secret(site, warmup, train):
    spend(site, 7.9)
    for request in (warmup, train):
        assert_refused(answer(site, request), RefusalCode.OVER_BUDGET)
    assert list(site.home.replies.iterdir()) == []


def test_one_outcome_per_charge_whatever_goes_wrong(tiny_home, train):
    """Memory that runs out after the charge: a refusal without text, stored and in the journal, and no second try."""
    site = dataclasses.replace(open_site(tiny_home), gradients=OutOfMemory())
    assert answer(site, train) == Reply(train.kind, train.run_id, train.round, RefusalCode.INTERNAL)
    assert (charged(site), len(released(site))) == (1, 1)
    assert answer(open_site(tiny_home), train).refusal == RefusalCode.INTERNAL
    assert (charged(site), len(released(site))) == (1, 1)


class OutOfMemory:
    """Fails when it is looked at, in the middle of training."""

    __hash__ = None

    def __eq__(self, other):
        raise MemoryError("patient 4711")


@pytest.mark.parametrize("book", ["ledger", "journal"])
def test_a_book_that_is_gone_stops_the_agent(tiny_home, train, book):
    site = open_site(tiny_home)
    answer(site, train)
    shutil.rmtree(tiny_home.folder / book)
    (tiny_home.folder / book).mkdir()
    assert answer(site, dataclasses.replace(train, round=2)).refusal == RefusalCode.INTERNAL
    if book == "journal":
        assert answer(site, train).refusal == RefusalCode.INTERNAL  # not even what left before
    with pytest.raises(StorageError, match=f"The {book} of this home is gone"):
        open_site(tiny_home)


def test_what_leaves_lies_on_the_public_grid(site, warmup):
    proposal = parse_proposal(warmup.proposal)
    std = plan(proposal, site.policy.declared_patients).charge_of_warmup().noise_multiplier
    embedding = answer(site, warmup).arrays["embedding"].astype(np.float64)
    step = 2.0 ** (math.floor(math.log2(std)) - 16)
    near = np.abs(embedding) < 2.0**24 * step  # what single precision holds exactly
    assert near.mean() > 0.5
    assert np.array_equal(embedding[near] / step, np.round(embedding[near] / step))


def test_journal_before_reply(site, warmup, train):
    for number, request in enumerate((warmup, train), start=1):
        reply = answer(site, request)
        entries = released(site)
        assert len(entries) == number
        assert entries[-1].sha256 == content_digest(reply)
        assert (entries[-1].run_id, entries[-1].round, entries[-1].kind) == ("run-1", request.round, request.kind)


def test_journal_before_reply_or_no_reply_at_all(tiny_home, train):
    head, kept = tiny_home.journal / "journal.head.json", tiny_home.folder / "kept"

    def break_the_journal(purpose):
        head.rename(kept)
        (tiny_home.journal / "journal.jsonl").write_bytes(b"{}\n")
        return KeyStream.from_os()

    assert_refused(answer(open_site(tiny_home, break_the_journal), train), RefusalCode.INTERNAL)
    kept.rename(head)
    (tiny_home.journal / "journal.jsonl").unlink()
    site = open_site(tiny_home)
    assert charged(site) == 1
    assert answer(site, train).refusal is None
    assert (charged(site), len(released(site))) == (1, 1)


def test_nothing_is_charged_when_the_journal_is_gone(site, train):
    for path in site.home.journal.iterdir():
        path.unlink()
    assert_refused(answer(site, train), RefusalCode.INTERNAL)
    assert charged(site) == 0


def test_repeat_is_free(site, warmup, train):
    for number, request in enumerate((warmup, train), start=1):
        first = pack_reply(answer(site, request))
        again = [pack_reply(answer(site, request)), pack_reply(answer(open_site(site.home), request))]
        assert again == [first, first]
        assert (charged(site), len(released(site))) == (number, number)


def test_repeat_after_the_stored_reply_is_gone_is_refused(site, warmup, train):
    for number, request in enumerate((warmup, train), start=1):
        answer(site, request)
        for path in site.home.replies.iterdir():
            path.unlink()
        assert_refused(answer(site, request), RefusalCode.REPLAYED)
        assert (charged(site), len(released(site))) == (number, number)


def test_repeat_with_a_damaged_reply_releases_nothing_else(site, train):
    answer(site, train)
    (stored,) = site.home.replies.iterdir()
    whole = stored.read_bytes()
    for damaged in (b"", b"\xff" * 100, whole[:80], whole[:-1], whole[:-4] + b"\0\0\0\0"):
        stored.write_bytes(damaged)
        reply = answer(site, train)
        assert reply.refusal is not None
        assert_refused(reply, reply.refusal)
        assert (charged(site), len(released(site))) == (1, 1)


def test_another_request_is_a_replay_after_a_restart_too(site, warmup, train):
    for number, request in enumerate((warmup, train), start=1):
        first = pack_reply(answer(site, request))
        other = changed(request, "privacy", epsilon=7.9)  # allowed by the policy, and another request
        for again in (site, open_site(site.home)):
            assert_refused(answer(again, other), RefusalCode.REPLAYED)
            assert pack_reply(answer(again, request)) == first
        assert (charged(site), len(released(site))) == (number, number)


def test_codes_only_when_the_reason_names_files_and_patients(site, warmup, train, tiny_proposal):
    """What went wrong stands in the site's log; nothing of it is in the bytes of the reply."""
    dataset_of(site, tiny_proposal).write_bytes(b"PatientID 4711 in /export/doe.dcm")
    for request in (warmup, train):
        reply = answer(site, request)
        frame = pack_reply(reply)
        assert frame == pack_reply(Reply(request.kind, request.run_id, request.round, reply.refusal))
        assert reply.refusal in (RefusalCode.NO_DATA, RefusalCode.INTERNAL)
        for secret in (b"4711", b"doe", b"dataset", str(site.home.folder).encode()):
            assert secret not in frame


def test_replies_of_a_run_whose_name_begins_like_another_are_kept_apart(site, train):
    """The last replies are kept for each run: those of "run-1-train-x" are none of "run-1"."""
    for number in (1, 2):
        answer(site, dataclasses.replace(train, run_id="run-1-train-x", round=number))
    first = answer(site, train)
    assert first.refusal is None
    assert pack_reply(answer(site, train)) == pack_reply(first)


def test_bounded(site, train, monkeypatch):
    """Many cheap runs: the latest ones' replies stay; one that was forgotten is refused, and never made anew."""
    cheap = changed(changed(train, "privacy", epsilon=0.05), "train", steps_per_round=1)
    asked = [dataclasses.replace(cheap, run_id=f"run-{number}") for number in range(7)]
    first = [answer(site, request) for request in asked]
    assert {reply.refusal for reply in first} == {None}
    assert len(list(site.home.replies.iterdir())) == replies.KEPT_RUNS
    assert_refused(answer(site, asked[0]), RefusalCode.REPLAYED)
    assert pack_reply(answer(site, asked[-1])) == pack_reply(first[-1])
    monkeypatch.setattr(replies, "KEPT_BYTES", 1)
    assert answer(site, dataclasses.replace(cheap, run_id="last")).refusal is None
    assert len(list(site.home.replies.iterdir())) == 1
    assert charged(site) == len(released(site)) == 8


def test_over_budget_is_refused_before_data_is_loaded(site, warmup, train, tiny_proposal):
    for request in (warmup, *(dataclasses.replace(train, round=number) for number in (1, 2, 3))):
        assert answer(site, request).refusal is None
    dataset_of(site, tiny_proposal).write_bytes(b"damaged")
    for request in (warmup, train):
        assert_refused(answer(site, dataclasses.replace(request, run_id="run-2")), RefusalCode.OVER_BUDGET)
    assert (charged(site), len(released(site))) == (4, 4)


def with_policy(site, **bounds):
    policies.save(site.home.policy, site.policy.model_copy(update=bounds))
    return site


@pytest.mark.parametrize("may_declare", [(), ("name",), ("patients",)])
def test_a_site_that_may_not_declare_says_nothing(site, warmup, train, may_declare):
    silent = with_policy(site, may_declare=may_declare)
    for request in (Request(Kind.HELLO, "run-1", 0, "", hello_settings()), warmup, train):
        assert_refused(answer(silent, request), RefusalCode.POLICY)
    assert (charged(site), released(site)) == (0, ())


@pytest.mark.parametrize("bounds", [{"max_sample_rate": 0.09}, {"min_noise_multiplier": 50.0}])
def test_a_plan_over_a_bound_is_refused_before_it_is_charged(site, train, bounds):
    assert_refused(answer(with_policy(site, **bounds), train), RefusalCode.POLICY)
    assert (charged(site), released(site)) == (0, ())


@pytest.mark.parametrize("kind", [Kind.WARMUP, Kind.TRAIN])
def test_a_reply_over_the_byte_bound_is_refused_before_it_is_charged(site, warmup, train, weights, kind):
    request, arrays = (train, weights) if kind is Kind.TRAIN else (warmup, {})
    bound = sum(array.nbytes for array in arrays.values()) or 2 * feature_dim(feature_map(28)) * 4
    assert_refused(answer(with_policy(site, max_reply_bytes=bound - 1), request), RefusalCode.POLICY)
    assert (charged(site), released(site)) == (0, ())
    assert answer(with_policy(site, max_reply_bytes=bound), request).refusal is None


@pytest.mark.parametrize("kind", [Kind.WARMUP, Kind.TRAIN])
def test_policy_of_the_moment_for_a_stored_reply(site, warmup, train, weights, kind):
    request, arrays = (train, weights) if kind is Kind.TRAIN else (warmup, {})
    bound = sum(array.nbytes for array in arrays.values()) or 2 * feature_dim(feature_map(28)) * 4
    first = pack_reply(answer(site, request))
    for number in (0, bound - 1):
        assert_refused(answer(with_policy(site, max_reply_bytes=number), request), RefusalCode.POLICY)
        assert_refused(answer(open_site(site.home), request), RefusalCode.POLICY)
    assert pack_reply(answer(with_policy(site, max_reply_bytes=bound), request)) == first
    assert (charged(site), len(released(site))) == (1, 1)


def test_a_stored_reply_that_the_journal_has_not_passes_the_door_again(site, train):
    """What was stored before a kill and is not what may leave: nothing of it does, and no line says that it did."""
    first = answer(site, train)
    later = dataclasses.replace(train, round=2)
    whole = dataclasses.replace(first, round=2, signature="")
    arrays = {name: np.full_like(array, np.nan) for name, array in whole.arrays.items()}
    for changes in ({"fields": {**whole.fields, "loss": 0.5}}, {"arrays": {}}, {"arrays": arrays}):
        replies.store_reply(site.home.replies, dataclasses.replace(whole, **changes), request_digest(later))
        assert_refused(answer(site, later), RefusalCode.INTERNAL)
        assert len(released(site)) == 1


def test_the_policy_is_asked_before_anything_is_computed_or_read(site, warmup, train, tiny_proposal):
    """What the policy refuses is refused for that reason, whatever else is wrong: no data, no weights, a plan that
    would take minutes or could not be made."""
    shutil.rmtree(dataset_of(site, tiny_proposal).parent)
    for request in (warmup, dataclasses.replace(train, arrays={})):
        endless = changed(changed(request, "train", steps_per_round=100_000), "federation", rounds=100_000)
        for refused in (endless, changed(request, "privacy", epsilon=8.1), changed(request, "model", name="dcgan")):
            narrow = with_policy(site, allowed_models=("mlp",))
            assert_refused(answer(narrow, refused), RefusalCode.POLICY)
    assert (charged(site), released(site)) == (0, ())


def test_policy_of_the_moment_when_tightened(site, warmup, train, tiny_proposal, caplog):
    """The file of the moment binds a running agent: the bound, and what was charged before it."""
    caplog.set_level("INFO", "fedmedgan.agent")
    assert answer(site, warmup).refusal is None
    with_policy(site, max_epsilon=1.0)
    cheap = changed(train, "privacy", epsilon=0.5)
    assert_refused(answer(site, train), RefusalCode.POLICY)
    assert_refused(answer(site, cheap), RefusalCode.OVER_BUDGET)
    assert (charged(site), len(released(site))) == (1, 1)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("max_epsilon: 8.0 -> 1.0" in line for line in lines) == 1
    with_policy(site, max_epsilon=8.0)
    assert answer(site, train).refusal is None


def test_policy_of_the_moment_for_a_charge_that_has_no_outcome_yet(tiny_home, train):
    """A charge that a kill left over is over the budget too once the budget is lowered."""
    cheap = changed(train, "privacy", epsilon=0.5)
    site = dataclasses.replace(open_site(tiny_home), gradients=KilledWhenUsed())
    with pytest.raises(Killed):
        answer(site, cheap)
    assert charged(site) == 1
    spend(site, 3.0)
    with_policy(site, max_epsilon=1.0)
    assert_refused(answer(open_site(tiny_home), cheap), RefusalCode.OVER_BUDGET)
    assert released(site) == ()


def spend(site, target):
    charge = Charge(noise_for(target, 1e-5, 1.0, 1), 1.0, 1)
    site.ledger.charge(ChargeRequest("earlier", 0, Kind.WARMUP, "digest"), charge, 8.0, 1e-5)


@pytest.mark.parametrize("content", [None, b"max_epsilon = [", b"nonsense = 1"])
def test_policy_of_the_moment_when_it_does_not_read(site, warmup, content):
    """A policy that is gone or half written allows nothing; mended, it counts again without a restart."""
    good = site.home.policy.read_bytes()
    site.home.policy.unlink()
    if content is not None:
        site.home.policy.write_bytes(content)
    for request in (Request(Kind.HELLO, "run-1", 0, warmup.proposal, hello_settings()), warmup):
        assert_refused(answer(site, request), RefusalCode.INTERNAL)
    assert (charged(site), released(site)) == (0, ())
    site.home.policy.write_bytes(good)
    assert answer(site, warmup).refusal is None


@pytest.mark.parametrize("left", [[], ["ledger.lock"], ["ledger.jsonl"], ["ledger.lock", "ledger.jsonl"]])
@pytest.mark.parametrize("used", [False, True])
def test_a_deleted_ledger_stops_the_agent(tiny_home, warmup, left, used):
    if used:
        answer(open_site(tiny_home), warmup)
    for path in tiny_home.ledger.iterdir():
        if path.name not in left:
            path.unlink()
    with pytest.raises(StorageError, match="backup"):
        open_site(tiny_home)
    assert "ledger.head.json" not in {path.name for path in tiny_home.ledger.iterdir()}


@pytest.fixture
def joined(tiny_home):
    """A site that has pinned its coordinator's key, on the tenth of January 2027."""
    pin(tiny_home)
    return dataclasses.replace(open_site(tiny_home, coordinator=COORDINATOR.verify_key), clock=lambda: NOW)


NOW = 1_799_539_200.0


def sealed(site, request, key=COORDINATOR, deadline=NOW + 60):
    return seal_request(key, request, deadline, site.key.verify_key)


def test_a_request_that_was_sealed_for_another_site_costs_nothing(joined, warmup):
    """One seal, two sites: the other one's is refused here."""
    for key in (SigningKey.generate().verify_key, None):
        for request in (warmup, train_request()):
            elsewhere = seal_request(COORDINATOR, request, NOW + 60, key)
            assert_refused(answer(joined, elsewhere), RefusalCode.BAD_REQUEST)
    assert charged(joined) == 0


def test_pinned_coordinator_only(joined, warmup):
    hello = Request(Kind.HELLO, "run-1", 0, warmup.proposal, hello_settings())
    for request in (hello, warmup):
        honest = sealed(joined, request)
        wrong = [request, sealed(joined, request, SigningKey.generate())]
        wrong += [dataclasses.replace(honest, **change) for change in ({"run_id": "run-2"}, {"round": 1})]
        wrong += [dataclasses.replace(honest, seal=dataclasses.replace(honest.seal, deadline=int(NOW) + 10**6))]
        for forged in wrong:
            assert answer(joined, forged).refusal is RefusalCode.BAD_REQUEST
    assert not joined.ledger.charges


def test_nothing_is_answered_once_the_site_has_left(joined, warmup):
    """Whatever still runs: `leave` is heard by the agent at its next request."""
    joined.home.federation.unlink()
    hello = Request(Kind.HELLO, "run-1", 0, warmup.proposal, hello_settings())
    assert [answer(joined, sealed(joined, one)).refusal for one in (hello, warmup)] == [RefusalCode.POLICY] * 2
    assert not joined.ledger.charges


def test_stale_requests_cost_nothing(joined, warmup):
    late = sealed(joined, warmup, deadline=NOW - 1)
    reply = answer(joined, late)
    assert reply.refusal is RefusalCode.EXPIRED
    check_reply(joined.key.verify_key, late, reply)
    assert not joined.ledger.charges
    assert answer(joined, sealed(joined, warmup)).refusal is None


@pytest.mark.parametrize("kind", [Kind.WARMUP, Kind.TRAIN])
@pytest.mark.parametrize(("leaves", "code"), [(False, RefusalCode.EXPIRED), (True, RefusalCode.POLICY)])
def test_timely_at_its_turn(joined, warmup, train, kind, leaves, code):
    """What waits while an import or another agent holds the home: too late, or the site has left, once it is free."""
    looked, late, replies = threading.Event(), threading.Event(), []

    def clock():
        now = NOW + 61 if late.is_set() else NOW
        looked.set()
        return now

    site, request = dataclasses.replace(joined, clock=clock), sealed(joined, warmup if kind is Kind.WARMUP else train)
    with (site.home.folder / "agent.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: replies.append(answer(site, request)))
        waiting.start()
        assert looked.wait(60)
        if leaves:
            site.home.federation.unlink()
        else:
            late.set()
    waiting.join()
    assert_refused(replies[0], code)
    check_reply(site.key.verify_key, request, replies[0])
    assert (charged(site), released(site), list(site.home.replies.iterdir())) == (0, (), [])


def test_a_sealed_request_gets_a_signed_answer_and_another_nonce_the_same_one_for_nothing(joined, warmup):
    first, again = sealed(joined, warmup), sealed(joined, warmup)
    replies = [answer(joined, request) for request in (first, again)]
    assert content_digest(replies[0]) == content_digest(replies[1])
    assert len(joined.ledger.charges) == 1
    for request, reply in zip((first, again), replies, strict=True):
        check_reply(joined.key.verify_key, request, reply)
    with pytest.raises(WireError):
        check_reply(joined.key.verify_key, again, replies[0])


def test_an_answer_within_one_machine_is_not_signed(site, warmup):
    assert answer(site, warmup).signature == ""


@pytest.fixture
def halved(tiny_proposal, weights):
    federation = tiny_proposal.federation.model_copy(update={"transport": "float16"})
    proposal = tiny_proposal.model_copy(update={"federation": federation}).proposal()
    return Request(Kind.TRAIN, "run-1", 1, proposal, {"d_steps_per_g_step": 1}, for_transport(weights, "float16"))


def test_weights_in_16_bits_are_rounded_before_they_are_stored_journaled_and_sent(site, halved, weights):
    reply = answer(site, halved)
    assert {array.dtype for array in reply.arrays.values()} == {np.dtype(np.float16)}
    assert 2 * size_bytes(reply.arrays) == size_bytes(weights)
    assert any((reply.arrays[name] != halved.arrays[name]).any() for name in weights)
    (line,) = released(site)
    assert (line.sha256, line.size_bytes) == (content_digest(reply), size_bytes(reply.arrays))
    again = answer(site, halved)
    assert content_digest(again) == content_digest(reply)
    assert (charged(site), len(released(site))) == (1, 1)


@pytest.mark.parametrize("transport", ["float32", "float16"])
def test_weights_of_the_other_transport_are_refused_before_they_cost(site, halved, train, weights, transport):
    request, other = (train, for_transport(weights, "float16")) if transport == "float32" else (halved, weights)
    reply = answer(site, dataclasses.replace(request, arrays=other))
    assert reply.refusal is RefusalCode.BAD_REQUEST
    assert (charged(site), len(released(site))) == (0, 0)
