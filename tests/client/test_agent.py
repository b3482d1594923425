"""The agent: its order of work, its refusals, its memory. Every request here may come from a hostile coordinator."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from client import journal
from client.agent import answer, open_site
from client.channel import pack_reply
from client.journal import check_egress, content_digest, release_schema
from client.ledger import read_ledger
from common.config import Proposal, parse_proposal
from common.crypto import KeyStream
from common.errors import RefusalCode, StorageError
from common.features import feature_dim, feature_map
from common.messages import PROTOCOL_VERSION, Kind, Request
from common.models import build
from common.weights import get_weights

ROOT = Path(__file__).resolve().parents[2]
BUDGET = {"epsilon_spent", "epsilon_allowed"}


@pytest.fixture(scope="module")
def weights(tiny_proposal):
    return get_weights(build(tiny_proposal.model, tiny_proposal.image, 2, torch.Generator().manual_seed(3)))


@pytest.fixture
def site(tiny_home):
    return open_site(tiny_home)


@pytest.fixture
def warmup(tiny_proposal):
    return Request(Kind.WARMUP, "run-1", 0, tiny_proposal.proposal())


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
    return site.home.dataset(proposal.image.classes, proposal.image.size)


def test_hello_says_exactly_this(site):
    reply = answer(site, Request(Kind.HELLO, "run-1", 0, ""))
    assert reply.refusal is None
    assert reply.fields == {"site": "st-mary", "declared_patients": 40, "protocol": PROTOCOL_VERSION}
    assert dict(reply.arrays) == {}
    assert charged(site) == 0


def test_hello_reads_nothing_of_the_request(site, weights):
    plain = answer(site, Request(Kind.HELLO, "run-1", 0, ""))
    noisy = answer(site, Request(Kind.HELLO, "run-1", 0, "{" * 10**6, {"d_steps_per_g_step": 0}, weights))
    assert noisy == plain


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


def test_images_that_were_never_imported_cost_nothing(site, warmup, train, tiny_proposal):
    dataset_of(site, tiny_proposal).unlink()
    for request in (warmup, train):
        assert_refused(answer(site, request), RefusalCode.NO_DATA)
    assert (charged(site), released(site)) == (0, ())


def test_charged_first_even_if_the_data_do_not_read(site, warmup, train, tiny_proposal):
    dataset_of(site, tiny_proposal).write_bytes(b"damaged")
    for number, request in enumerate((warmup, train), start=1):
        assert answer(site, request).refusal in (RefusalCode.NO_DATA, RefusalCode.INTERNAL)
        assert charged(site) == number
    assert [entry.size_bytes for entry in released(site)] == [0, 0]  # outcomes, and nothing in them


def test_charged_first_before_secrets_are_drawn(tiny_home, train):
    seen = []

    def secrets(purpose):
        seen.append((purpose, charged(open_site(tiny_home))))
        return KeyStream.from_os()

    answer(open_site(tiny_home, secrets), train)
    assert [count for _, count in seen] == [1]


def test_repeat_is_free_after_a_crash_in_training(tiny_home, train):
    def crash(purpose):
        raise ZeroDivisionError(purpose)

    with pytest.raises(ZeroDivisionError):
        answer(open_site(tiny_home, crash), train)
    site = open_site(tiny_home)
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


def test_another_request_for_the_same_round_is_a_replay(site, train, weights):
    answer(site, train)
    others = {name: array + np.float32(1e-3) for name, array in weights.items()}
    changes = (
        {"arrays": others},
        {"settings": {"d_steps_per_g_step": 2}},
        {"proposal": Proposal.model_validate_json(train.proposal).model_dump_json(indent=1)},
    )
    for gone in (False, True):
        for path in site.home.replies.iterdir() if gone else ():
            path.unlink()
        for change in changes:
            assert_refused(answer(site, dataclasses.replace(train, **change)), RefusalCode.REPLAYED)
    assert (charged(site), len(released(site))) == (1, 1)


def test_a_round_charged_and_not_answered_is_a_replay_for_other_weights(tiny_home, train, weights):
    def crash(purpose):
        raise ZeroDivisionError(purpose)

    with pytest.raises(ZeroDivisionError):
        answer(open_site(tiny_home, crash), train)
    others = {name: array + np.float32(1e-3) for name, array in weights.items()}
    site = open_site(tiny_home)
    assert_refused(answer(site, dataclasses.replace(train, arrays=others)), RefusalCode.REPLAYED)
    assert (charged(site), released(site)) == (1, ())


def test_replies_of_a_run_whose_name_begins_like_another_are_kept_apart(site, train):
    """The last replies are kept for each run: those of "run-1-train-x" are none of "run-1"."""
    for number in (1, 2):
        answer(site, dataclasses.replace(train, run_id="run-1-train-x", round=number))
    first = answer(site, train)
    assert first.refusal is None
    assert pack_reply(answer(site, train)) == pack_reply(first)


def test_over_budget_is_refused_before_data_is_loaded(site, warmup, train, tiny_proposal):
    for request in (warmup, *(dataclasses.replace(train, round=number) for number in (1, 2, 3))):
        assert answer(site, request).refusal is None
    dataset_of(site, tiny_proposal).write_bytes(b"damaged")
    for request in (warmup, train):
        assert_refused(answer(site, dataclasses.replace(request, run_id="run-2")), RefusalCode.OVER_BUDGET)
    assert (charged(site), len(released(site))) == (4, 4)


def test_two_runs_in_parallel_share_one_budget(tiny_home, warmup, train):
    replies = {"run-1": [], "run-2": []}

    def run(name):
        own = open_site(tiny_home)
        replies[name].append(answer(own, dataclasses.replace(warmup, run_id=name)))
        for number in (1, 2, 3):
            replies[name].append(answer(own, dataclasses.replace(train, run_id=name, round=number)))

    threads = [threading.Thread(target=run, args=(name,)) for name in replies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [reply for part in replies.values() for reply in part]
    assert len(everything) == 8
    granted = [reply for reply in everything if reply.refusal is None]
    assert {reply.refusal for reply in everything} == {None, RefusalCode.OVER_BUDGET}
    site = open_site(tiny_home)
    assert charged(site) == len(released(site)) == len(granted)
    assert max(reply.fields["epsilon_spent"] for reply in granted) == site.ledger.spent(1e-5) <= 8.0


def changed(request, section, **values):
    tree = json.loads(request.proposal)
    tree.setdefault(section, {}).update(values)
    return dataclasses.replace(request, proposal=json.dumps(tree))


def with_arrays(request, change):
    arrays = dict(request.arrays)
    change(arrays)
    return dataclasses.replace(request, arrays=arrays)


def poisoned(arrays, value):
    name = "discriminator.last.bias"
    arrays[name] = np.full_like(arrays[name], value)


BIAS = "discriminator.last.bias"
HOSTILE_TRAIN = {
    "epsilon above the policy": lambda r: changed(r, "privacy", epsilon=8.1),
    "epsilon without end": lambda r: changed(r, "privacy", epsilon=1e300),
    "another delta": lambda r: changed(r, "privacy", delta=2e-5),
    "delta of nearly one": lambda r: changed(r, "privacy", delta=0.999),
    "delta of nearly nothing": lambda r: changed(r, "privacy", delta=1e-300),
    "a noise multiplier of its own": lambda r: changed(r, "privacy", noise_multiplier=0.0),
    "clip norm of 1e9": lambda r: changed(r, "privacy", max_grad_norm=1e9),
    "clip norm of nearly nothing": lambda r: changed(r, "privacy", max_grad_norm=1e-30),
    "51 images per patient": lambda r: changed(r, "privacy", images_per_patient=51),
    "more patients than declared": lambda r: changed(r, "privacy", min_patients=41),
    "a batch that no float holds": lambda r: changed(r, "privacy", batch_patients=10**400),
    "1e9 steps": lambda r: changed(r, "train", steps_per_round=10**9),
    "more steps than the policy": lambda r: changed(r, "train", steps_per_round=1001),
    "a generator batch that fits no memory": lambda r: changed(r, "train", generator_batch=10**12),
    "too many rounds": lambda r: changed(r, "federation", rounds=501),
    "1e9 rounds": lambda r: changed(r, "federation", rounds=10**9),
    "no rounds": lambda r: changed(r, "federation", rounds=0),
    "unknown model": lambda r: changed(r, "model", name="diffusion"),
    "a model's path": lambda r: changed(r, "model", name="../../etc"),
    "huge model": lambda r: changed(r, "model", generator_width=10**6),
    "other model": lambda r: changed(r, "model", name="dcgan"),
    "no classes": lambda r: changed(r, "image", classes=[]),
    "one class more": lambda r: changed(r, "image", classes=["clear", "opacity", "nodule"]),
    "unknown section": lambda r: changed(r, "secrets", key="x"),
    "simulation": lambda r: changed(r, "simulation", data="/"),
    "proposal of 1 MB": lambda r: dataclasses.replace(r, proposal=r.proposal + " " * 10**6),
    "no proposal": lambda r: dataclasses.replace(r, proposal=""),
    "proposal is no JSON": lambda r: dataclasses.replace(r, proposal=r.proposal[:-1]),
    "proposal is a list": lambda r: dataclasses.replace(r, proposal="[]"),
    "proposal is deep": lambda r: dataclasses.replace(r, proposal="[" * 60_000),
    "proposal is no text": lambda r: dataclasses.replace(r, proposal="\ud800"),
    "round 0": lambda r: dataclasses.replace(r, round=0),
    "round 4 of 3": lambda r: dataclasses.replace(r, round=4),
    "round -1": lambda r: dataclasses.replace(r, round=-1),
    "round 10^100": lambda r: dataclasses.replace(r, round=10**100),
    "NaN weights": lambda r: with_arrays(r, lambda arrays: poisoned(arrays, np.nan)),
    "infinite weights": lambda r: with_arrays(r, lambda arrays: poisoned(arrays, -np.inf)),
    "no weights": lambda r: dataclasses.replace(r, arrays={}),
    "a missing array": lambda r: with_arrays(r, lambda arrays: arrays.pop(BIAS)),
    "an extra array": lambda r: with_arrays(r, lambda arrays: arrays.update(extra=np.zeros(1, np.float32))),
    "a huge array": lambda r: with_arrays(r, lambda arrays: arrays.update({BIAS: np.zeros(10**7, np.float32)})),
    "an array of another shape": lambda r: with_arrays(r, lambda arrays: arrays.update({BIAS: arrays[BIAS][None]})),
    "an array of doubles": lambda r: with_arrays(r, lambda arrays: arrays.update({BIAS: np.zeros(1)})),
    "an array of texts": lambda r: with_arrays(r, lambda arrays: arrays.update({BIAS: np.array(["x"])})),
    "another setting": lambda r: dataclasses.replace(r, settings={**r.settings, "seed": 1}),
}
HOSTILE_WARMUP = {
    "share of 0": lambda r: changed(r, "warmup", share=0.0),
    "share of 1": lambda r: changed(r, "warmup", share=1.0),
    "warm-up in round 1": lambda r: dataclasses.replace(r, round=1),
    "warm-up with weights": lambda r: dataclasses.replace(r, arrays={"w": np.zeros(1, np.float32)}),
    "warm-up with settings": lambda r: dataclasses.replace(r, settings={"d_steps_per_g_step": 1}),
    "warm-up above the policy": lambda r: changed(r, "privacy", epsilon=9.0),
}
RUN_IDS = ["", "a/b", "../../x", "a.b", "A", "a b", "a\n", "ü", "a" * 65, "*", "\0", "\ud800"]
D_STEPS = [None, 0, -1, 5001, 10**9, 1.0, 2.5, True, "1", float("nan"), [1], {}]


def assert_costs_nothing(site, request):
    reply = answer(site, request)
    assert reply.refusal in (RefusalCode.POLICY, RefusalCode.BAD_REQUEST, RefusalCode.NO_DATA)
    assert_refused(reply, reply.refusal)
    assert (reply.kind, reply.run_id, reply.round) == (request.kind, request.run_id, request.round)
    assert (charged(site), released(site), list(site.home.replies.iterdir())) == (0, (), [])


@pytest.mark.parametrize("how", HOSTILE_TRAIN)
def test_codes_only_and_no_charge_for_a_hostile_round(site, train, how):
    assert_costs_nothing(site, HOSTILE_TRAIN[how](train))


@pytest.mark.parametrize("how", HOSTILE_WARMUP)
def test_codes_only_and_no_charge_for_a_hostile_warmup(site, warmup, how):
    assert_costs_nothing(site, HOSTILE_WARMUP[how](warmup))


@pytest.mark.parametrize("run_id", RUN_IDS)
def test_codes_only_and_no_charge_for_a_hostile_run_id(site, train, warmup, run_id):
    for request in (train, warmup):
        assert_costs_nothing(site, dataclasses.replace(request, run_id=run_id))


@pytest.mark.parametrize("d_steps", D_STEPS, ids=repr)
def test_codes_only_and_no_charge_for_hostile_d_steps(site, train, d_steps):
    settings = {} if d_steps is None else {"d_steps_per_g_step": d_steps}
    assert_costs_nothing(site, dataclasses.replace(train, settings=settings))


def test_weights_made_to_overflow_are_harmless(site, train, weights):
    """They are finite, so they are taken; the answer is released or refused, and charged in both cases."""
    loud = {name: np.full_like(array, 3e38) for name, array in weights.items()}
    reply = answer(site, dataclasses.replace(train, arrays=loud))
    assert reply.refusal in (None, RefusalCode.INTERNAL)
    assert charged(site) == 1
    assert [entry.size_bytes > 0 for entry in released(site)] == [reply.refusal is None]
    assert answer(site, dataclasses.replace(train, arrays=loud)).refusal == reply.refusal  # no second try


@pytest.mark.slow
def test_sample_rate_of_one_is_paid_for(site, warmup, train):
    everybody = changed(train, "privacy", batch_patients=4000)
    assert answer(site, changed(warmup, "privacy", batch_patients=4000)).refusal is None
    for number in (1, 2, 3):
        assert answer(site, dataclasses.replace(everybody, round=number)).refusal is None
    assert {charge.sample_rate for charge in site.ledger.charges} == {1.0}
    assert site.ledger.spent(1e-5) <= 8.0


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


# forks one agent for each line it reads, so that imports are paid for once; each answers rounds until it is killed
NURSERY = """
import os, sys
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from client.agent import answer, open_site
from client.home import Home
from client.journal import content_digest
from common.config import parse_proposal
from common.messages import Kind, Request
from common.privacy import plan
home, text = Home(Path(sys.argv[1])), sys.argv[2]
with np.load(sys.argv[3], allow_pickle=False) as arrays:
    weights = dict(arrays)
plan(parse_proposal(text), 40)  # remembered, so that a victim has time for rounds
for line in sys.stdin:
    receive, send = os.pipe()
    victim = os.fork()
    if victim:
        os.write(1, f"born {victim}\\n".encode())
        os.write(send, b"!")
        os.waitpid(victim, 0)
        os.write(1, b"dead\\n")
        os.close(receive)
        os.close(send)
        continue
    os.read(receive, 1)
    site = open_site(home)
    for number in range(int(line), 400):
        reply = answer(site, Request(Kind.TRAIN, "run-1", number, text, {"d_steps_per_g_step": 1}, weights))
        os.write(1, f"{number} {reply.refusal or content_digest(reply)}\\n".encode())
"""


@pytest.mark.slow
def test_kill_9_loses_no_charge_and_no_release(tiny_home, train, tiny_proposal, weights, tmp_path):
    long = changed(changed(train, "federation", rounds=400), "train", steps_per_round=1)
    long = changed(long, "warmup", share=0.0)
    np.savez(tmp_path / "weights.npz", **weights)
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(tiny_home.folder), long.proposal, str(tmp_path / "weights.npz")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    moment, printed = random.Random(11), {}
    for attempt in range(60):
        if attempt >= 15 and len(printed) >= 8:  # enough kills and enough rounds
            break
        nursery.stdin.write(f"{max(printed, default=0) + 1}\n")
        nursery.stdin.flush()
        victim = int(nursery.stdout.readline().removeprefix("born "))
        time.sleep(moment.uniform(0.0, 0.8 + 0.1 * attempt))  # longer and longer, for a slow machine gets there too
        os.kill(victim, signal.SIGKILL)
        for line in nursery.stdout:
            if "dead" in line:
                break
            number, digest = line.split()
            printed[int(number)] = digest
        site = open_site(tiny_home)
        in_journal = {entry.round: entry.sha256 for entry in released(site)}
        in_ledger = [entry.request.round for entry in site.ledger.entries]
        assert printed.items() <= in_journal.items()
        assert set(in_journal) <= set(in_ledger)
        assert len(in_ledger) == len(set(in_ledger)) <= len(in_journal) + 1
        if printed:
            last = max(printed)
            again = answer(site, dataclasses.replace(long, round=last))
            assert content_digest(again) == printed[last]
            assert len(open_site(tiny_home).ledger.entries) == len(in_ledger)
    nursery.communicate(timeout=30)
    assert len(printed) >= 8
