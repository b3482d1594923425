"""Who is drawn, what the generator may see, and one round of local training."""

import copy
import dataclasses
import functools
import inspect
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from client.dp import private_gradient, private_optimizer
from client.draw import draw_patients
from client.train import generator_step, train_round
from common.config import PrivacyConfig, Proposal
from common.crypto import KeyStream
from common.losses import WEIGHT_BOUND
from common.models import build
from common.noise import gaussian
from common.plan import Plan
from tests.tiny_site import numbered

KEY = bytes(range(32))
PATIENTS = 20
PROPOSAL = Proposal.model_validate(
    {
        "image": {"size": 28, "classes": ("clear", "opacity")},
        "privacy": {"batch_patients": 4, "images_per_patient": 2},
        "model": {"name": "mlp", "latent_dim": 4, "generator_width": 8, "discriminator_width": 8},
        "train": {"steps_per_round": 6, "generator_batch": 7, "ema_decay": 0.0, "learning_rate_g": 1e-2},
    }
)
PLAN = Plan(PATIENTS, 0.2, None, 1.0, 6, 1.0, 1e-5)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def fresh_pair():
    return build(PROPOSAL.model, PROPOSAL.image, 2, rng(1))


def proposed(**train):
    return PROPOSAL.model_copy(update={"train": PROPOSAL.train.model_copy(update=train)})


def one_round(secret=KEY, seed=0, *, d_steps=2, plan=PLAN, proposal=PROPOSAL, pair=None):
    dataset = numbered([1, 3] * (PATIENTS // 2), 28)
    return train_round(dataset, pair or fresh_pair(), proposal, plan, d_steps, KeyStream(secret), rng(seed))


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_training_goes_on_with_empty_batches():
    before = fresh_pair()
    trained = one_round(plan=dataclasses.replace(PLAN, sample_rate=1e-9))
    assert torch.isfinite(weights(trained.pair.discriminator)).all()
    assert not torch.equal(weights(trained.pair.discriminator), weights(before.discriminator))
    assert 0 <= trained.fake_accuracy <= 1


def test_generator_step_has_no_parameter_for_a_patient():
    names = list(inspect.signature(generator_step).parameters)
    assert names == ["generator", "discriminator", "optimizer", "proposal", "rng"]


def test_private_autoencoder_in_the_same_round():
    """The generator that leaves is the private decoder; fakes are none; the noise of a step is not the secret's."""
    model = PROPOSAL.model.model_copy(update={"name": "vae", "latent_dim": 14})
    proposal = PROPOSAL.model_copy(update={"model": model})

    def trained(secret=KEY, seed=0):
        return one_round(secret, seed, proposal=proposal, pair=build(model, PROPOSAL.image, 2, rng(1)))

    first = trained()
    assert first.fake_accuracy == 0.0
    assert torch.equal(weights(first.pair.generator), weights(first.pair.discriminator.decoder))
    assert not torch.equal(weights(first.pair.generator), weights(build(model, PROPOSAL.image, 2, rng(1)).generator))
    assert torch.equal(weights(first.pair.discriminator), weights(trained().pair.discriminator))
    for other in (trained(secret=bytes(32)), trained(seed=1)):
        assert not torch.equal(weights(first.pair.discriminator), weights(other.pair.discriminator))


def test_wasserstein_round_ends_within_the_public_bound():
    trained = one_round(proposal=proposed(loss="wasserstein"))
    assert weights(trained.pair.discriminator).abs().max() == WEIGHT_BOUND
    assert weights(one_round().pair.discriminator).abs().max() > WEIGHT_BOUND


def test_generator_step_leaves_the_discriminator_alone():
    pair = fresh_pair()
    before, old = weights(pair.discriminator), weights(pair.generator)
    for parameter in pair.discriminator.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    generator_step(
        pair.generator, pair.discriminator, torch.optim.Adam(pair.generator.parameters(), lr=1e-3), PROPOSAL, rng()
    )
    assert torch.equal(weights(pair.discriminator), before)
    assert all((parameter.grad == 7).all() for parameter in pair.discriminator.parameters())
    assert not torch.equal(weights(pair.generator), old)


def test_round_is_deterministic_given_secret_and_rng():
    first, again = one_round(), one_round()
    assert first.fake_accuracy == again.fake_accuracy
    for one, other in (
        (first.pair.generator, again.pair.generator),
        (first.pair.discriminator, again.pair.discriminator),
    ):
        assert torch.equal(weights(one), weights(other))
    for other in (one_round(secret=bytes(32)), one_round(seed=1)):
        assert not torch.equal(weights(first.pair.discriminator), weights(other.pair.discriminator))


def test_global_random_state_is_neither_read_nor_moved():
    before = torch.get_rng_state()
    one_round()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("d_steps", "g_steps"), [(1, 6), (2, 3), (4, 1), (6, 1), (7, 0)])
def test_ladder_changes_the_number_of_generator_steps(d_steps, g_steps):
    pair, seen = fresh_pair(), []
    before = weights(pair.generator)
    pair.generator.register_forward_hook(lambda _, __, images: seen.append((len(images), images.requires_grad)))
    trained = one_round(d_steps=d_steps, pair=pair)
    assert Counter(seen) == Counter({(4, False): 6, (7, True): g_steps})
    assert torch.equal(weights(trained.pair.generator), before) == (g_steps == 0)


def test_what_leaves_is_the_average_of_the_generators():
    start = weights(fresh_pair().generator)
    first, second = (
        weights(one_round(d_steps=3, proposal=proposed(steps_per_round=steps)).pair.generator) for steps in (3, 6)
    )
    averaged = weights(one_round(d_steps=3, proposal=proposed(ema_decay=0.75)).pair.generator)
    expected = 0.75 * (0.75 * start + 0.25 * first) + 0.25 * second
    torch.testing.assert_close(averaged, expected, rtol=1e-4, atol=1e-6)


def test_the_noise_of_the_plan_is_the_noise_of_the_round():
    """Adam's first step is a sign: each weight says whether the noise turned its gradient, as often as sigma says."""
    sigma, everybody = 0.02, dataclasses.replace(PLAN, sample_rate=1.0, train_noise_multiplier=0.02)
    pair, proposal, stream = fresh_pair(), proposed(steps_per_round=1), rng()
    start, dataset = weights(pair.discriminator), numbered([1] * PATIENTS, 28)
    labels = torch.randint(2, (PATIENTS,), generator=stream)
    fakes = pair.generator(torch.randn(PATIENTS, 4, generator=stream), labels).detach()
    silent = private_optimizer(copy.deepcopy(pair.discriminator), proposal.privacy, proposal.train, 0.0, 0.5)
    private_gradient(
        silent,
        draw_patients(dataset, 1.0, PrivacyConfig(), KeyStream(KEY)),
        fakes,
        labels,
        functools.partial(gaussian, KeyStream(KEY)),
    )
    total = torch.cat([parameter.grad.flatten() for parameter in silent.discriminator.parameters()])
    trained = train_round(dataset, pair, proposal, everybody, 2, KeyStream(KEY), rng()).pair.discriminator
    turned = ((weights(trained) - start).sign() == total.sign()).double().sum().item()

    def deviation(std):
        chance = stats.norm.cdf(-total.abs().double().numpy() / std)
        return abs(turned - chance.sum()) / np.sqrt((chance * (1 - chance)).sum())

    assert deviation(sigma) < 5
    assert deviation(sigma * 2 / 3) > 5
    assert deviation(sigma * 3 / 2) > 5


def test_hooks_are_gone_after_the_round():
    pair = fresh_pair()
    for _ in range(2):
        trained = one_round(pair=copy.deepcopy(pair))
        assert not hasattr(trained.pair.discriminator, "autograd_grad_sample_hooks")
        assert all(not module._forward_hooks for module in trained.pair.discriminator.modules())
