"""The private gradient against a plain loop over patients, its sensitivity, its noise and hostile weights."""

import copy
import functools
import gc
import math
import threading
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client.dp import Batch, private_gradient, private_optimizer, private_step
from client.dp.contributions import Product
from client.dp.packing import Chunk
from client.dp.step import rounding
from common.config import ImageConfig, ModelConfig, ModelName, PrivacyConfig, TrainConfig
from common.crypto import KeyStream
from common.losses import WEIGHT_BOUND
from common.models import build
from common.models.vae import renew_noise
from common.noise import gaussian
from simulations.benchmark.memory import peak_bytes

KEY = bytes(range(32))
CLASSES = 3
ENGINES = ["fast", "opacus"]
ARCHITECTURES = [("mlp", 28), ("mlp", 64), ("dcgan", 28), ("dcgan", 32), ("dcgan", 64)]
OTHERS = [(name, 3, 32, engine) for name in get_args(ModelName) for engine in ENGINES]
OTHERS += [(name, 1, 128, "fast") for name in get_args(ModelName)]
LATENT = 13  # with the classes 16: a matrix product with fewer columns rounds its rows differently on some machines


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(name="mlp", size=28, channels=1):
    config = ModelConfig(name=name, latent_dim=LATENT, generator_width=8, discriminator_width=8)
    discriminator = build(config, ImageConfig(size=size, channels=channels), CLASSES, rng(1)).discriminator
    renew_noise(discriminator, rng(2))
    return discriminator


def images(count, size=28, seed=0, channels=1):
    drawn = torch.rand(count, channels, size, size, generator=rng(seed)) * 2 - 1
    return drawn, torch.randint(CLASSES, (count,), generator=rng(seed + 1))


def batch_of(counts, size=28, seed=0, channels=1):
    drawn, labels = images(sum(counts), size, seed, channels)
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    return Batch(drawn, labels, rows, len(counts))


def prepared(model, clip=1.0, noise=0.0, divisor=4.0, engine="fast", loss="logistic"):
    return private_optimizer(model, PrivacyConfig(max_grad_norm=clip), TrainConfig(loss=loss), noise, divisor, engine)


def secret(key=KEY):
    return functools.partial(gaussian, KeyStream(key))


def gradient(model, batch, fakes, *, clip=1.0, noise=0.0, divisor=4.0, key=KEY, engine="fast", loss="logistic"):
    """Return the private gradient as one vector of double precision; the model is left as it was."""
    model = copy.deepcopy(model)
    private_gradient(prepared(model, clip, noise, divisor, engine, loss), batch, *fakes, secret(key))
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()


def clipped_sum(model, batch, fakes, clip=1.0, engine="fast"):
    return gradient(model, batch, fakes, clip=clip, divisor=0.5, engine=engine)


def plain_loop(model, batch, fakes, clip, divisor, loss="logistic"):
    """The same by autograd on one image at a time: mean over a patient's images, clip, sum, divide."""
    parameters, evidence = list(model.parameters()), hasattr(model, "decoder")

    def one(image, label, sign):
        signed = sign * model(image[None], label[None])
        loss_of_one = F.softplus(signed) if loss == "logistic" and not evidence else signed
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss_of_one.sum(), parameters)]).double()

    real = [one(image, label, -1) for image, label in zip(batch.images, batch.labels, strict=True)]
    patients = [
        torch.stack([real[index] for index in torch.nonzero(batch.patients == patient).flatten()]).mean(0)
        for patient in range(batch.number_of_patients)
    ]
    generated = [] if evidence else [one(image, label, 1) for image, label in zip(*fakes, strict=True)]
    contributions = patients + generated
    return sum(part * min(1.0, clip / part.norm().item()) for part in contributions) / (2 * divisor)


def assert_near(actual, expected):
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def patients_and_images(most):
    return st.lists(st.one_of(st.just(1), st.integers(1, most)), max_size=4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "size"), ARCHITECTURES)
@settings(deadline=None, derandomize=True, max_examples=6)
@given(
    counts=patients_and_images(50),
    fakes=st.integers(1, 4),
    clip=st.sampled_from([0.01, 1.0, 4.0, 100.0]),
    divisor=st.floats(0.5, 100),
    seed=st.integers(0, 1000),
)
def test_gradient_is_that_of_a_plain_loop_over_patients(name, size, engine, counts, fakes, clip, divisor, seed):
    model, batch, generated = network(name, size), batch_of(counts, size, seed), images(fakes, size, seed + 5)
    expected = plain_loop(model, batch, generated, clip, divisor)
    assert_near(gradient(model, batch, generated, clip=clip, divisor=divisor, engine=engine), expected)


@pytest.mark.parametrize(("name", "channels", "size", "engine"), OTHERS)
def test_gradient_of_every_model_in_colour_and_at_128_pixels(name, channels, size, engine, monkeypatch):
    """Without kinks: of so many activations one lies within rounding of its kink, where autograd itself is no guide."""
    monkeypatch.setattr(F, "leaky_relu", lambda hidden, slope: F.silu(hidden) + slope * hidden)
    model, batch = network(name, size, channels), batch_of([2, 1], size, 3, channels)
    fakes = images(2, size, 9, channels)
    norm = plain_loop(model, batch_of([1], size, 3, channels), images(0, size), math.inf, 0.5).norm().item()
    for clip in (norm / 2, 1e3):  # one that clips and one that does not
        assert_near(gradient(model, batch, fakes, clip=clip, engine=engine), plain_loop(model, batch, fakes, clip, 4.0))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["mlp", "dcgan", "resnet"])
@pytest.mark.parametrize("clip", [0.01, 100.0])
def test_gradient_of_a_wasserstein_critic(name, clip, engine):
    model, batch, fakes = network(name), batch_of([3, 1, 2]), images(3, seed=9)
    expected = plain_loop(model, batch, fakes, clip, 4.0, "wasserstein")
    assert_near(gradient(model, batch, fakes, clip=clip, engine=engine, loss="wasserstein"), expected)
    if clip == 100.0:  # clipped, both losses have the same direction
        assert (expected - plain_loop(model, batch, fakes, clip, 4.0)).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("loss", ["logistic", "wasserstein"])
def test_step_raises_reals_and_lowers_fakes(loss):
    model, batch, fakes = network("dcgan"), batch_of([1] * 8), images(8, seed=9)
    bright = Batch(batch.images.abs(), batch.labels, batch.patients, 8)
    dark = (-fakes[0].abs(), fakes[1])
    private = prepared(model, clip=100.0, loss=loss)

    def difference():
        with torch.no_grad():
            return (model(bright.images, bright.labels).mean() - model(*dark).mean()).item()

    private_step(private, bright, *dark, secret())  # the bound on weights changes much once
    before = difference()
    for _ in range(5):
        private_step(private, bright, *dark, secret())
    assert difference() > before


def test_step_keeps_a_critic_within_its_public_bound_and_no_other():
    batch, fakes = batch_of([1]), images(1, seed=9)
    for loss, bounded in (("logistic", False), ("wasserstein", True)):
        model = network("dcgan")
        private_step(prepared(model, loss=loss, noise=1.0), batch, *fakes, secret())
        largest = max(parameter.abs().max().item() for parameter in model.parameters())
        assert (largest <= WEIGHT_BOUND) == bounded


def test_step_of_a_private_autoencoder_raises_the_evidence_and_ignores_fakes():
    model, batch = network("vae"), batch_of([1] * 8)
    private = prepared(model, clip=100.0)

    def evidence():
        with torch.no_grad():
            return model(batch.images, batch.labels).mean().item()

    before = evidence()
    for _ in range(5):
        private_step(private, batch, *images(0), secret())
    assert evidence() > before
    fakes = images(3, seed=9)
    assert torch.equal(gradient(model, batch, fakes), gradient(model, batch, images(0)))


def test_every_thread_of_a_private_autoencoder_sees_the_noise_of_the_step():
    model, batch, before = network("vae"), batch_of([1] * 40), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        private = prepared(copy.deepcopy(model), clip=0.01)
        private.adder.prepare((1, 28, 28))
        renew_noise(private.discriminator, rng(7))
        private_gradient(private, batch, *images(0), secret())
    finally:
        torch.set_num_threads(before)
    several = torch.cat([parameter.grad.flatten() for parameter in private.discriminator.parameters()]).double()
    stale = gradient(model, batch, images(0), clip=0.01)
    renew_noise(model, rng(7))
    assert torch.equal(several, gradient(model, batch, images(0), clip=0.01))
    assert not torch.equal(several, stale)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("counts", [[], [1], [50], [1, 1, 1], [2, 1, 3], [1] * 70, [200, 1], [64, 65, 33]])
def test_gradient_of_batches_at_the_edge(counts, engine):
    model, batch, fakes = network("dcgan", 28), batch_of(counts), images(2, seed=9)
    assert_near(gradient(model, batch, fakes, engine=engine), plain_loop(model, batch, fakes, 1.0, 4.0))


def test_clip_makes_a_difference_in_these_tests():
    model, batch, fakes = network(), batch_of([1, 2, 3]), images(2, seed=9)
    assert (clipped_sum(model, batch, fakes, 1.0) - clipped_sum(model, batch, fakes, 100.0)).norm() > 0.1


def test_step_is_adam_on_the_private_gradient_and_leaves_nothing_behind():
    model, other, fakes, batch = network(), network(), images(3, seed=9), batch_of([2, 1])
    private = prepared(model, noise=1.0)
    for _ in range(2):
        private_step(private, batch, *fakes, secret())
    adam = torch.optim.Adam(other.parameters(), lr=TrainConfig().learning_rate_d, betas=(0.5, 0.999), fused=True)
    for _ in range(2):
        parts = gradient(other, batch, fakes, noise=1.0).float().split([p.numel() for p in other.parameters()])
        for parameter, part in zip(other.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        adam.step()
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)
        assert parameter.grad is None


@pytest.mark.parametrize(("name", "size"), [*ARCHITECTURES, ("resnet", 28), ("vae", 28)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("divisor", [4.0, 500.0])
def test_company_changes_nothing(name, size, scale, slots, engine, divisor):
    """Bit for bit, at every place of a chunk and beside anybody: what hostile weights magnify must not be there."""
    model = network(name, size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    mine, private = images(slots, size, seed=3), prepared(model, engine=engine, divisor=divisor)
    private.adder.prepare((1, size, size))
    rows = private.adder.rows
    assert rows == (32 if divisor < 96 else 64)
    weights = torch.full((rows,), 1 / slots)

    def of_mine(place, seed):
        company = images(rows, size, seed)
        around, labels = company[0].clone(), company[1].clone()
        around[place * slots : (place + 1) * slots], labels[place * slots : (place + 1) * slots] = mine
        chunk = Chunk(around, labels, weights, slots)
        parts, last = engine_of(private).contributions(_softplus, chunk)
        mine_of = []
        for part in parts:
            values = (part.outputs.float(), part.inputs.float()) if isinstance(part, Product) else (part.values,)
            mine_of += [value[place].flatten().clone() for value in values]
        if last is not None:
            few = ((place - some.start, part) for some, part in last.few() if some.start <= place < some.stop)
            mine_of += [part.values[row].clone() for row, part in few]
        norms = [part.squared_norms()[place] for part in parts]
        return torch.cat(mine_of), torch.stack(norms)

    alone = of_mine(0, 4)
    for place, seed in [(0, 5), (1, 5), (rows // slots // 2, 6), (rows // slots - 1, 7)]:
        for one, other in zip(of_mine(place, seed), alone, strict=True):
            assert torch.equal(one, other), (place, seed)


@pytest.mark.parametrize(("name", "size"), [("mlp", 28), ("dcgan", 28), ("resnet", 28), ("vae", 28)])
@settings(deadline=None, derandomize=True, max_examples=12)
@given(
    counts=patients_and_images(6),
    count=st.sampled_from([1, 2, 7, 200]),
    clip=st.sampled_from([0.001, 1.0, 3.0]),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_one_clipped_contribution_when_a_patient_is_added(name, size, counts, count, clip, scale, seed):
    model, fakes = network(name, size), images(2, seed=9)
    others, (mine, labels) = batch_of(counts, size, seed), images(count, size, seed + 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    everybody = Batch(
        torch.cat([others.images, mine]),
        torch.cat([others.labels, labels]),
        torch.cat([others.patients, torch.full((count,), len(counts))]),
        len(counts) + 1,
    )
    moved = (clipped_sum(model, everybody, fakes, clip) - clipped_sum(model, others, fakes, clip)).norm()
    assert moved <= clip * (1 + 1e-4)
    if scale == 1.0 and clip == 0.001:
        assert moved >= clip * (1 - 1e-2)  # the bound is reached, so the test can fail


def test_one_clipped_contribution_when_images_are_duplicated_or_moved():
    model, fakes, batch = network("dcgan"), images(2, seed=9), batch_of([3, 1, 2])
    rows = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5])
    more = Batch(batch.images[rows], batch.labels[rows], batch.patients[rows], 3)
    assert_near(clipped_sum(model, more, fakes), clipped_sum(model, batch, fakes))
    shuffled = torch.tensor([5, 0, 3, 1, 4, 2])
    mixed = Batch(batch.images[shuffled], batch.labels[shuffled], batch.patients[shuffled], 3)
    assert_near(clipped_sum(model, mixed, fakes), clipped_sum(model, batch, fakes))
    moved = Batch(batch.images, batch.labels, torch.tensor([0, 0, 0, 1, 1, 2]), 3)  # two patients change
    assert (clipped_sum(model, moved, fakes) - clipped_sum(model, batch, fakes)).norm() <= 4


def test_one_clipped_contribution_when_a_sampled_patient_has_no_image():
    model, fakes, batch = network(), images(2, seed=9), batch_of([2])
    padded = Batch(batch.images, batch.labels, batch.patients, 2)  # as many images as patients, not one each
    assert_near(clipped_sum(model, padded, fakes), clipped_sum(model, batch, fakes))


def engine_of(private):
    return private.adder._engines[0]


def _softplus(logits):
    return F.softplus(-logits)


CANCELLING = [
    ("mlp", 64, 256),
    ("mlp", 64, 128),
    ("dcgan", 28, 192),
    ("dcgan", 28, 100),
    ("dcgan", 32, 15),
    ("dcgan", 64, 50),
]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "size", "width"), CANCELLING)
def test_company_changes_nothing_where_weights_cancel(name, size, width, engine):
    """The attack that found it: wide networks, two rows a chunk, a last layer that cancels on one image, times 1e8.

    Whoever joins moves the others to other places; a difference of one bit between places becomes a logit of a hundred.
    """
    config = ModelConfig(name=name, latent_dim=2, generator_width=8, discriminator_width=width)
    model = build(config, ImageConfig(size=size), CLASSES, rng(1)).discriminator
    private = prepared(model, divisor=500.0, engine=engine)
    private.adder.prepare((1, size, size))
    (one, other), _ = images(2, size, seed=3)
    hidden, rows = [], private.adder.rows
    places, labels = one.expand(rows, -1, -1, -1), torch.zeros(rows, dtype=torch.int64)
    handle = model.last.register_forward_pre_hook(lambda _, arguments: hidden.append(arguments[0][0].double()))
    with torch.no_grad():
        model(places, labels)
        handle.remove()
        drawn = torch.randn(hidden[0].numel(), generator=rng(5)).double()
        drawn -= (drawn @ hidden[0]) / (hidden[0] @ hidden[0]) * hidden[0]
        model.last.weight.copy_(drawn.float()[None] * 1e8)
        model.last.bias.zero_()
        model.last.bias.fill_(-model(places, labels).mean())
    others = torch.stack([one, other] * 6)

    def total(drawn):
        count = len(drawn)
        batch = Batch(drawn, torch.zeros(count, dtype=torch.int64), torch.arange(count), count)
        return private.adder.clipped_sum([(batch, _softplus)])

    moved = total(torch.cat([other[None], others])) - total(others)
    assert moved.norm() <= 1 + rounding(500.0)


class Wide(torch.nn.Module):
    """Three million weights whose gradient has one long row and many short ones: its sum of squares, added up in single
    precision, comes out short."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(784, 4096), torch.nn.Linear(4096, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.last.weight.fill_(8e-4)[0, 0] = 1.0

    def forward(self, images, labels):
        return self.last(self.first(images.flatten(1))).squeeze(1)


@pytest.mark.slow
def test_one_clipped_contribution_when_the_weights_are_many():
    model = Wide()
    fakes = (torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64))
    patient = Batch(torch.ones(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1)
    nobody = Batch(patient.images[:0], patient.labels[:0], patient.patients[:0], 0)
    moved = clipped_sum(model, patient, fakes) - clipped_sum(model, nobody, fakes)
    assert 0.999 <= moved.norm() <= 1 + 1e-4


class Single(torch.nn.Module):
    """One weight, whose gradient is an image of one pixel."""

    def __init__(self):
        super().__init__()
        self.only = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.only.weight)

    def forward(self, images, labels):
        return self.only(images.flatten(1)).squeeze(1)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e10, 1e18, 1e30, 3e38])
def test_one_clipped_contribution_when_the_gradient_is_huge(size):
    label = torch.zeros(1, dtype=torch.int64)
    patient, fakes = Batch(torch.full((1, 1, 1, 1), size), label, label, 1), (torch.zeros(1, 1, 1, 1), label)
    for clip in (1e-6, 1e-3, 1.0):
        assert clipped_sum(Single(), patient, fakes, clip).norm() <= clip * (1 + 1e-4)


def test_public_divisor_does_not_depend_on_the_batch():
    model, fakes = network(), images(3, seed=9)
    for batch in (batch_of([]), batch_of([1]), batch_of([3, 1, 5, 2, 2])):
        total = clipped_sum(model, batch, fakes)
        for divisor in (1.0, 8.0, 300.0):
            assert_near(gradient(model, batch, fakes, divisor=divisor) * 2 * divisor, total)


def test_public_divisor_counts_equal_patients_one_by_one():
    model, fakes, one = network(), images(3, seed=9), batch_of([1])
    alone = gradient(model, batch_of([]), fakes)
    twice = Batch(one.images.expand(2, -1, -1, -1), one.labels.expand(2), torch.arange(2), 2)
    assert_near(gradient(model, twice, fakes) - alone, 2 * (gradient(model, one, fakes) - alone))


@pytest.mark.parametrize("counts", [[], [1, 3]])
@pytest.mark.parametrize(("noise", "clip", "divisor"), [(1.0, 1.0, 4.0), (3.0, 0.5, 20.0)])
def test_empty_batch_is_noise_of_the_stated_law(counts, noise, clip, divisor):
    model, batch, fakes = network(), batch_of(counts), images(2, seed=9)
    settings = {"clip": clip, "divisor": divisor}
    drawn = gradient(model, batch, fakes, noise=noise, **settings) - gradient(model, batch, fakes, **settings)
    std, size = noise * clip / (2 * divisor), len(drawn)

    def p_value(scale):
        return stats.kstest(drawn.numpy(), stats.norm(scale=scale).cdf).pvalue

    assert abs(drawn.std().item() / std - 1) < 5 / math.sqrt(2 * size)
    assert abs(drawn.mean().item()) < 5 * std / math.sqrt(size)
    assert p_value(std) > 0.01
    assert p_value(std * 2 / 3) < 1e-9
    assert p_value(std * 3 / 2) < 1e-9


def test_empty_batch_is_noise_that_is_new_in_every_step_and_for_every_key():
    model, fakes, size = network(), images(2, seed=9), sum(p.numel() for p in network().parameters())
    private, stream, drawn = prepared(model, noise=1.0), KeyStream(KEY), []
    for _ in range(2):
        private_gradient(private, batch_of([]), *fakes, functools.partial(gaussian, stream))
        drawn.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).numpy())
    drawn.append(gradient(network(), batch_of([]), fakes, noise=1.0, key=bytes(32)).numpy())
    correlations = np.corrcoef(drawn)[np.triu_indices(3, 1)]
    assert np.all(np.abs(correlations) < 5 / math.sqrt(size))


def overflowing_average(model):
    """Make each image's gradient finite and the sum of three infinite."""
    for parameter in model.parameters():
        parameter.zero_()
    body = model.blocks[-1] if hasattr(model, "blocks") else model
    before_the_last = model.second if hasattr(model, "second") else body.convolutions[-1]
    before_the_last.bias.fill_(3e38)


HOSTILE = {
    "weights of 1e18": lambda model: [parameter.mul_(1e18) for parameter in model.parameters()],
    "weights of 1e37": lambda model: [parameter.fill_(1e37) for parameter in model.parameters()],
    "weights of both signs": lambda model: [
        parameter.copy_(torch.where(parameter > 0, 3e38, -3e38)) for parameter in model.parameters()
    ],
    "the average overflows": overflowing_average,
}


@pytest.mark.parametrize("name", ["mlp", "dcgan", "resnet", "vae"])
@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("counts", [[], [1], [1, 1], [3, 1, 4]])
def test_always_finite_under_hostile_weights(name, how, counts):
    model, batch, fakes = network(name), batch_of(counts), images(1, seed=9)
    with torch.no_grad():
        HOSTILE[how](model)
    assert_noise_and_little_else(model, batch, fakes)


@pytest.mark.parametrize("value", [1e30, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("counts", [[1], [2, 1]])
def test_always_finite_with_images_that_overflow(value, counts):
    drawn = batch_of(counts)
    batch = Batch(drawn.images * value, drawn.labels, drawn.patients, len(counts))
    assert_noise_and_little_else(network("dcgan"), batch, images(1, seed=9))


def assert_noise_and_little_else(model, batch, fakes):
    """The sum without its noise stays within the clipped contributions, and nothing says that something overflowed."""
    total = gradient(model, batch, fakes, noise=1.0, divisor=0.5)
    assert torch.isfinite(total).all()
    nobody = gradient(model, batch_of([]), fakes, noise=1.0, divisor=0.5)  # the same noise, and the fakes
    assert (total - nobody).norm() <= batch.number_of_patients * (1 + 1e-4) + 1e-3
    assert stats.kstest(total.numpy(), stats.norm.cdf).pvalue > 0.01


def test_one_patients_overflow_leaves_the_others_alone():
    model, fakes, batch = network("dcgan"), images(1, seed=9), batch_of([1, 2])
    loud = batch.images.clone()
    loud[0] = math.inf
    total = clipped_sum(model, Batch(loud, batch.labels, batch.patients, 2), fakes)
    without = Batch(batch.images[1:], batch.labels[1:], torch.tensor([0, 0]), 1)
    assert (total - clipped_sum(model, without, fakes)).norm() <= 1 + 1e-4


@pytest.mark.slow
def test_bounded_memory_however_many_patients_are_sampled():
    model, fakes = network("dcgan"), images(8, seed=9)

    def peak(patients):
        private, batch = prepared(copy.deepcopy(model)), batch_of([1] * patients)
        private_gradient(private, batch, *fakes, secret())
        return peak_bytes(lambda: private_gradient(private, batch, *fakes, secret()))

    small, large = peak(64), peak(640)
    assert small > 100_000
    assert large < 1.2 * small


def test_threads_change_nothing():
    model, batch, fakes = network("dcgan"), batch_of([1] * 70 + [3, 200, 2]), images(40, seed=9)
    alone = gradient(model, batch, fakes, noise=1.0)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            private = prepared(copy.deepcopy(model))
            assert private.adder.threads == threads
            assert torch.get_num_threads() == threads
            assert torch.equal(gradient(model, batch, fakes, noise=1.0), alone)
    finally:
        torch.set_num_threads(before)


def test_threads_end_with_the_optimizer_and_errors_come_through():
    before, others = torch.get_num_threads(), set(threading.enumerate())
    try:
        torch.set_num_threads(2)
        private = prepared(network("dcgan"))
        mine = set(threading.enumerate()) - others
        assert len(mine) == 2
        with pytest.raises(RuntimeError):
            private_gradient(private, batch_of([1], size=5), *images(1, seed=9), secret())
        private_gradient(private, batch_of([1]), *images(1, seed=9), secret())
    finally:
        torch.set_num_threads(before)
    del private
    gc.collect()
    for thread in mine:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_one_clipped_contribution_has_noise_that_covers_its_rounding():
    asked = []

    def noise(shape, std):
        asked.append((shape, std))
        return torch.zeros(shape, dtype=torch.float64)

    model = network()
    private_gradient(prepared(model, clip=0.5, noise=2.0, divisor=64.0), batch_of([1]), *images(1, seed=9), noise)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert asked == [((numbers,), 2.0 * 0.5 * (1 + 2.0**-12 + 2.0**-12))]  # 2 * 64 + 128 patients at 2^-20


def test_rounded_last_and_on_the_public_grid():
    model, divisor = network(), 0.5
    private_gradient(prepared(model, noise=1.5, divisor=divisor), batch_of([1, 2]), *images(2, seed=9), secret())
    for parameter in model.parameters():
        places = parameter.grad.double() * 2 * divisor / 2.0**-16  # 2^-16 of 1, the power of two below 1.5
        assert torch.equal(places, places.round())
