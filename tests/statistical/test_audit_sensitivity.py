"""What one patient can move: at most the clip, whatever is done with images. Every law is broken once, and more moves.

The law and its breach are one function of the released sum with and without the patient.
"""

from dataclasses import replace

import pytest
import torch

from client.dp import Batch, private_gradient, private_optimizer
from common.config import ImageConfig, ModelConfig, PrivacyConfig, TrainConfig
from common.models import build

CLIP, LONG, ROUNDING = 0.1, 1e4, 1 + 2**-11


def rng(seed):
    return torch.Generator().manual_seed(seed)


def images(count, seed=0):
    return torch.rand(count, 1, 28, 28, generator=rng(seed)) * 2 - 1


def batch_of(drawn, patients):
    numbers = torch.tensor(patients)
    return Batch(drawn, torch.zeros(len(drawn), dtype=torch.int64), numbers, int(numbers.max()) + 1)


def without_last(batch):
    """Remove all images of the last patient."""
    last = batch.number_of_patients - 1
    stay = batch.patients != last
    return Batch(batch.images[stay], batch.labels[stay], batch.patients[stay], last)


def by_image(batch):
    """Clip images instead of patients."""
    return replace(batch, patients=torch.arange(len(batch.images)), number_of_patients=len(batch.images))


def silence(shape, std):
    return torch.zeros(shape, dtype=torch.float64)


def release(batch, divisor=0.5, clip=CLIP):
    """Return the gradient without its noise; with a divisor of one half it is the sum."""
    config = ModelConfig(name="mlp", latent_dim=2, generator_width=8, discriminator_width=8)
    network = build(config, ImageConfig(size=28), 1, rng(1)).discriminator
    private = private_optimizer(network, PrivacyConfig(max_grad_norm=clip), TrainConfig(), 1.0, divisor)
    private_gradient(private, batch, images(3, seed=7), torch.zeros(3, dtype=torch.int64), silence)
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).double()


def moved(batch, unit=lambda batch: batch, clip=CLIP):
    return (release(unit(batch), clip=clip) - release(unit(without_last(batch)), clip=clip)).norm().item()


DRAWN = images(210)
BATCHES = {
    "one patient with two hundred images": batch_of(DRAWN, [0] * 7 + [1, 2, 2] + [3] * 200),
    "images of the first moved to the last": batch_of(DRAWN[:12], [0] + [3] * 6 + [1, 2, 2] + [3] * 2),
    "images of the last thirty times": batch_of(DRAWN[[0, 1, 2, *[3, 4] * 30]], [0, 0, 1] + [2] * 60),
}


@pytest.mark.parametrize("name", BATCHES)
def test_sensitivity_is_the_clip_and_more_when_the_unit_or_the_clip_is_broken(name):
    batch = BATCHES[name]
    assert 0.99 * CLIP < moved(batch) <= CLIP * ROUNDING
    assert moved(batch, unit=by_image) > 2 * CLIP
    assert moved(batch, clip=LONG) > 2 * CLIP


def test_sensitivity_to_what_is_done_with_images_of_a_patient():
    """Order and copies change nothing; clipped image by image, copies count."""
    first, second = DRAWN[:3], DRAWN[3:5]
    once = batch_of(torch.cat([first, second]), [0, 0, 0, 1, 1])
    turned = batch_of(torch.cat([second.flip(0), first.roll(1, dims=0)]), [1, 1, 0, 0, 0])
    copied = batch_of(torch.cat([first, *[second] * 30]), [0, 0, 0] + [1] * 60)
    for other in (turned, copied):
        assert (release(other) - release(once)).norm() < 1e-3 * CLIP
    assert (release(by_image(copied)) - release(by_image(once))).norm() > 2 * CLIP


@pytest.mark.parametrize("patients", [3, 30])
def test_sensitivity_of_the_quotient_with_a_public_divisor_and_with_one_from_the_data(patients):
    """The added patient disagrees with the rest; who divides by the cohort also shrinks everybody else's part."""
    agreeing = [DRAWN[:1]] * patients
    together = batch_of(torch.cat([*agreeing, -DRAWN[:1]]), range(patients + 1))
    alone = without_last(together)

    def moves(before, after):
        return (release(together, divisor=after) - release(alone, divisor=before)).norm().item()

    bound = CLIP / (2 * patients) * ROUNDING
    assert moves(patients, patients) <= bound
    assert moves(patients, patients + 1) > 1.2 * bound
