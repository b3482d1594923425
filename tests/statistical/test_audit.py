"""Audits of local training: the strongest adversary proves less than the stated epsilon, and more with a part broken.

Keys are fixed; the bounds are printed. Nothing is patched: what is broken is a setting, a plan or a data set that the
site would refuse or never make.
"""

import functools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from client.dp import Batch, private_gradient, private_optimizer
from common.audit import correct_guesses, epsilon_of_mu, neighbour_epsilon, neighbour_mu, one_run_epsilon
from common.config import ImageConfig, ModelConfig, PrivacyConfig, TrainConfig
from common.crypto import KeyStream
from common.models import build
from common.noise import gaussian
from common.privacy import Charge, epsilon, noise_for
from tests.statistical.audit_training import DELTA, SIZE, Training, along, dataset, directions, images

KEY = bytes(32)
CANARIES, GUESSES, ORDINARY = 1000, 300, 23
OFF = 1e4
"""No gradient is as long as that many clips, and noise divided by it is none."""


@pytest.fixture
def report(record_property):
    """Print a bound (`pytest -rP` shows it, on however many processes), and keep it in the report of the tests."""
    started = time.monotonic()

    def line(audit, stated, **bounds):
        text = ", ".join(f"{name} {bound:.2f}" for name, bound in bounds.items())
        record_property(audit, text)
        print(f"{audit}: stated epsilon {stated:g}; proved: {text} ({time.monotonic() - started:.0f} s)")

    return line


def coins(key):
    return np.frombuffer(KeyStream(key).derive("coins").read(CANARIES), np.uint8) % 2 == 1


def proved_by_guesses(scores, included):
    return one_run_epsilon(CANARIES, GUESSES, correct_guesses(scores, included, GUESSES), DELTA)


def one_run_of_training(training, key=KEY):
    """Train once on ordinary patients and on half of the canaries, and guess which half."""
    included = coins(key)
    present = np.concatenate([images(0, CANARIES)[included], images(CANARIES, CANARIES + ORDINARY)])
    scores = along(training.movement(dataset(present), key), directions(images(0, CANARIES)))
    return proved_by_guesses(scores, included)


@pytest.mark.slow
def test_one_run_audit_of_the_whole_training(report):
    stated, steps, rounds, rate = 4.0, 4, 16, 0.5
    noise_multiplier = noise_for(stated, DELTA, rate, steps * rounds)
    assert epsilon([Charge(noise_multiplier, rate, steps * rounds)], DELTA) <= stated
    training = Training(noise_multiplier, rate, CANARIES // 2, steps, rounds)
    private = one_run_of_training(training)
    clip_off = one_run_of_training(replace(training, clip_factor=OFF))
    noise_off = one_run_of_training(replace(training, noise_factor=1 / OFF))
    for_one_in_ten = noise_for(stated, DELTA, 0.1, steps * rounds)
    draw_off = one_run_of_training(replace(training, noise_multiplier=for_one_in_ten, sample_rate=1.0))
    bounds = {"clip_off": clip_off, "noise_off": noise_off, "draw_off": draw_off}
    report("one run, 64 steps in 16 rounds", stated, private=private, **bounds)
    assert 0.5 < private < stated
    assert min(bounds.values()) > stated


def one_run_of_gradient(noise_multiplier, clip_factor=1.0, noise_factor=1.0, key=KEY):
    """As above for one private gradient of an honest network, with everybody in the batch."""
    model = ModelConfig(name="mlp", latent_dim=2, generator_width=8, discriminator_width=8)
    network = build(model, ImageConfig(size=SIZE), 1, torch.Generator().manual_seed(1)).discriminator
    towards, included = -directions(images(0, CANARIES), network), coins(key)
    multiplier = noise_multiplier * noise_factor / clip_factor
    privacy = PrivacyConfig(max_grad_norm=0.01 * clip_factor)
    private = private_optimizer(network, privacy, TrainConfig(), multiplier, CANARIES / 2)
    private_gradient(
        private,
        one_image_each(images(0, CANARIES)[included]),
        torch.zeros(CANARIES // 2, 1, SIZE, SIZE),
        torch.zeros(CANARIES // 2, dtype=torch.int64),
        functools.partial(gaussian, KeyStream(key)),
    )
    return proved_by_guesses(along(network.first.weight.grad.double(), towards), included)


def one_image_each(drawn):
    number = len(drawn)
    scaled = torch.from_numpy(drawn).float() / 127.5 - 1
    return Batch(scaled, torch.zeros(number, dtype=torch.int64), torch.arange(number), number)


@pytest.mark.slow
def test_one_run_audit_of_one_private_gradient(report):
    stated = 4.0
    noise_multiplier = noise_for(stated, DELTA, 1.0, 1)
    private = one_run_of_gradient(noise_multiplier)
    clip_off = one_run_of_gradient(noise_multiplier, clip_factor=OFF)
    noise_off = one_run_of_gradient(noise_multiplier, noise_factor=1 / OFF)
    report("one run, one gradient", stated, private=private, clip_off=clip_off, noise_off=noise_off)
    assert 0.5 < private < stated
    assert clip_off > stated
    assert noise_off > stated


STATED = 3.0
"""Of the neighbour audits: rounds of one step on all patients, so that the mechanism is mu-GDP and nothing better."""

RUNS, FEW_RUNS = 400, 128


@functools.cache
def stated_noise():
    return noise_for(STATED, DELTA, 1.0, 1)


def training_of(patients, **broken):
    return Training(stated_noise(), 1.0, patients, 1, **broken)


def neighbours(patients, *, patient_level=True):
    """Return a data set with and without one more patient, who has fifty equal images."""
    others, mine = images(1, patients + 1), np.repeat(images(0, 1), 50, axis=0)
    everything, last = np.concatenate([others, mine]), np.full(50, patients)
    numbers = np.append(np.arange(patients), last) if patient_level else None
    return dataset(everything, numbers), dataset(others)


TOWARDS_THE_PATIENT = directions(images(0, 1))


def towards_the_patient(movement):
    return along(movement, TOWARDS_THE_PATIENT)[0]


def stillness(movement):
    return -movement.norm().item()


def scores(training, data, runs, score, label, key=KEY):
    stream = KeyStream(key).derive(label)
    return np.array([score(training.movement(data, stream.read(32))) for _ in range(runs)])


def audit(trainings, data, runs, score=towards_the_patient, key=KEY):
    """Return the bound on epsilon that assumes nothing, and the one on mu."""
    sides = zip(trainings, data, ("with", "without"), strict=True)
    found = [scores(training, known, runs, score, label, key) for training, known, label in sides]
    return neighbour_epsilon(*found, DELTA), neighbour_mu(*found)


def both(training):
    return training, training


@pytest.mark.slow
@pytest.mark.parametrize("patients", [3, 30, 300])
def test_neighbour_audit(patients, report):
    proved, mu = audit(both(training_of(patients)), neighbours(patients), RUNS)
    as_gaussian = epsilon_of_mu(mu, DELTA)
    report(f"neighbours, n = {patients}", STATED, assuming_nothing=proved, by_mu=as_gaussian)
    assert proved < STATED
    assert 0.5 < as_gaussian < STATED


def clip_off(patients):
    return both(training_of(patients, clip_factor=OFF)), neighbours(patients), towards_the_patient


def noise_off(patients):
    return both(training_of(patients, noise_factor=1 / OFF)), neighbours(patients), towards_the_patient


def divisor_from_the_data(patients):
    """Declare the exact cohort: noise that is divided by it tells how many there are."""
    return (training_of(patients + 1), training_of(patients)), neighbours(patients), stillness


def clip_by_image(patients):
    return both(training_of(patients)), neighbours(patients, patient_level=False), towards_the_patient


@pytest.mark.slow
@pytest.mark.parametrize("broken", [clip_off, noise_off, divisor_from_the_data, clip_by_image])
def test_neighbour_audit_exceeds_the_stated_epsilon(broken, report):
    trainings, data, score = broken(3)
    proved, mu = audit(trainings, data, FEW_RUNS, score)
    report(f"neighbours, n = 3, {broken.__name__}", STATED, assuming_nothing=proved, mu=mu)
    assert proved > STATED
    assert mu > 1 / stated_noise()


@pytest.mark.slow
def test_neighbour_audit_sees_nothing_in_a_public_divisor(report):
    proved, mu = audit(both(training_of(3)), neighbours(3), FEW_RUNS, stillness)
    report("neighbours, n = 3, size of the noise", STATED, assuming_nothing=proved, mu=mu)
    assert proved < STATED
    assert mu < 1 / stated_noise()
