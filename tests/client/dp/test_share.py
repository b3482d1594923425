"""A site's share: its pre-image's sensitivity, its noise, its order, and that it always fits."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client.dp import Batch, integer_share, make_adder
from client.dp.step import rounding
from common.config import ImageConfig, ModelConfig, PrivacyConfig, TrainConfig
from common.crypto import KeyStream
from common.losses import losses_of
from common.models import build
from common.noise import gaussian
from common.secure_sum import GRID

KEY = bytes(range(32))
TRAIN = TrainConfig()
CLASSES = 3
EMPTY = Batch(torch.empty(0, 1, 28, 28), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 0)


def network(name="mlp", scale=1.0):
    config = ModelConfig(name=name, latent_dim=2, generator_width=8, discriminator_width=8)
    rng = torch.Generator().manual_seed(1)
    discriminator = build(config, ImageConfig(size=28), CLASSES, rng).discriminator
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(scale)
    return discriminator


def batch_of(counts, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(sum(counts), 1, 28, 28, generator=rng) * 2 - 1
    labels = torch.randint(CLASSES, (sum(counts),), generator=rng)
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    return Batch(images, labels, rows, len(counts))


def without(batch, patient):
    kept = batch.patients != patient
    patients = batch.patients[kept]
    return Batch(batch.images[kept], batch.labels[kept], patients - (patients > patient).long(), len(set(patients)))


def share(batch, model=None, *, clip=1.0, noise=0.0, divisor=4.0, key=KEY, engine="fast"):
    adder = make_adder(model or network(), PrivacyConfig(max_grad_norm=clip), divisor, engine)
    secret = functools.partial(gaussian, KeyStream(key))
    return integer_share(adder, batch, losses_of(adder.discriminator, TRAIN).of_real, clip, noise, divisor, secret)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 5), st.sampled_from([1e-2, 1.0, 50.0]))
def test_one_clipped_contribution_moves_what_is_rounded_by_at_most_the_clipping_norm(counts, patient, scale):
    patient, clip = patient % len(counts), 0.5
    model, batch = network(scale=scale), batch_of(counts)
    moved = (share(batch, model, clip=clip) - share(without(batch, patient), model, clip=clip)) * (GRID * clip)
    rounded = 2 * 0.5 * GRID * clip * len(moved) ** 0.5  # both shares are rounded; without noise that shows
    assert np.linalg.norm(moved) <= clip * (1 + rounding(4.0)) + rounded


def test_one_clipped_contribution_where_the_gradient_is_long():
    """With weights that make every gradient long, one patient moves the sum by all of the clipping norm."""
    moved = share(batch_of([3, 1]), network(scale=3.0)) - share(batch_of([3]), network(scale=3.0))
    alone = share(batch_of([2]), network(scale=3.0))
    assert np.linalg.norm(alone) * GRID == pytest.approx(1.0, rel=1e-3)
    assert np.linalg.norm(moved) * GRID < 2.0


@pytest.mark.parametrize("name", ["mlp", "dcgan", "vae"])
def test_numbers_stand_in_the_order_of_the_parameters_whatever_the_engine(name):
    """The coordinator cuts the share by the parameters' shapes, so the fast engine's own order must not leave."""
    model, batch = network(name), batch_of([1])
    parameters = list(model.parameters())
    raised = model(batch.images, batch.labels)
    loss = -raised.sum() if name == "vae" else torch.nn.functional.softplus(-raised).sum()
    plain = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]).double()
    expected = (plain * min(1.0, 1.0 / plain.norm()) / GRID).numpy()
    for engine in ("fast", "opacus"):
        np.testing.assert_allclose(share(batch, network(name), engine=engine), expected, atol=2.0)
    assert np.abs(expected - np.roll(expected, 1)).max() > 100  # another order would be seen


@pytest.mark.parametrize("batch", [EMPTY, batch_of([1])], ids=["nobody", "one patient"])
def test_empty_batch_is_noise_of_the_asked_deviation(batch):
    noise_multiplier, clip = 2.0, 0.25
    drawn = share(batch, clip=clip, noise=noise_multiplier) - share(batch, clip=clip).astype(np.int64)
    std = noise_multiplier * (1 + rounding(4.0)) / GRID
    assert stats.kstest(drawn / std, "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(drawn / (wrong * std), "norm").pvalue < 1e-6


def test_the_sum_of_shares_has_the_noise_of_a_whole_step():
    parts, whole = 4, 1.5
    keys = [bytes([number]) * 32 for number in range(parts)]
    total = sum(share(EMPTY, noise=whole / parts**0.5, key=key).astype(np.int64) for key in keys)
    std = whole * (1 + rounding(4.0)) / GRID
    assert stats.kstest(total / std, "norm").pvalue > 1e-3
    assert stats.kstest(total / (std / parts**0.5), "norm").pvalue < 1e-6  # that of one share
    other = share(EMPTY, noise=whole / parts**0.5, key=keys[1])
    assert abs(np.corrcoef(share(EMPTY, noise=whole / 2, key=keys[0]), other)[0, 1]) < 4 / len(other) ** 0.5


def test_rounding_is_post_processing_of_the_noisy_sum():
    """The same noise on two sums: what leaves are the nearest whole steps to sum plus noise in each coordinate."""
    batch, noise = batch_of([2, 1, 3]), 0.7
    std = noise * (1 + rounding(4.0))
    drawn = gaussian(KeyStream(KEY), (len(share(EMPTY)),), std).numpy() / GRID
    np.testing.assert_array_equal(share(EMPTY, noise=noise), np.rint(drawn))
    assert np.abs(share(batch, noise=noise) - drawn - share(batch)).max() <= 1.0


def test_always_fits_whatever_the_noise():
    drawn = share(EMPTY, noise=1e6)
    assert drawn.dtype == np.int32
    assert np.abs(drawn.astype(np.int64)).max() == 2**31 - 1
    assert set(np.sign(drawn[np.abs(drawn) == 2**31 - 1])) == {-1, 1}  # cut, not wrapped
