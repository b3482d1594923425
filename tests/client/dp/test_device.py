"""The private step on other devices, and with activations of eight bits.

The device without storage stands for one that is not there: on it every read by the host is an error.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from client.dp import Batch, private_gradient, private_optimizer
from client.dp.contributions import add_clipped
from client.dp.fast import FastEngine
from client.dp.packing import Chunk
from common.config import ImageConfig, ModelConfig, PrivacyConfig, TrainConfig
from common.models import build
from common.noise import to_public_grid

ROWS = 32
ARCHITECTURES = [("mlp", 28), ("dcgan", 28), ("dcgan", 32), ("dcgan", 64), ("resnet", 28), ("vae", 28)]


def network(name, size):
    model, image = ModelConfig(name=name), ImageConfig.model_validate({"size": size})
    discriminator = build(model, image, 3, torch.Generator().manual_seed(0)).discriminator
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(2.0)  # so that some gradients are clipped
    return discriminator


def chunk_of(size, slots, count=ROWS):
    rng = torch.Generator().manual_seed(1)
    weights = torch.zeros(ROWS)
    weights[:count] = 1 / slots
    images = torch.rand(ROWS, 1, size, size, generator=rng) * 2 - 1
    return Chunk(images, torch.randint(3, (ROWS,), generator=rng), weights, slots)


def clipped(discriminator, chunk, clip, bf16=False):
    """Take the part of a step that sees patients, and what follows the noise, on the network's device."""
    parameters = list(discriminator.parameters())
    engine = FastEngine(discriminator, ROWS, bf16)
    parts, last = engine.contributions(F.softplus, chunk.to(parameters[0].device))
    numbers = sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(numbers, dtype=torch.float64, device=parameters[0].device)
    add_clipped(total, parts, last, clip)
    return total, engine.by_parameter(to_public_grid(total.clone(), 1.0).float())


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize(("name", "size"), ARCHITECTURES)
def test_a_step_on_another_device_never_waits_for_the_host(name, size, slots):
    total, gradient = clipped(network(name, size).to("meta"), chunk_of(size, slots), 1.0)
    assert total.device.type == "meta"
    assert [part.shape for part in gradient] == [parameter.shape for parameter in network(name, size).parameters()]


def test_reading_on_that_device_would_be_seen():
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        bool(torch.zeros(3, device="meta").any())


@pytest.mark.parametrize(("name", "size"), ARCHITECTURES)
def test_bf16_gives_nearly_the_same_sum(name, size):
    exact, _ = clipped(network(name, size), chunk_of(size, 1), 1.0)
    coarse, _ = clipped(network(name, size), chunk_of(size, 1), 1.0, bf16=True)
    difference = (coarse - exact).norm() / exact.norm()
    assert 1e-6 < difference < 2e-2


@pytest.mark.parametrize(("name", "size"), ARCHITECTURES)
def test_bf16_keeps_norms_exact(name, size):
    lonely = chunk_of(size, 1, count=1)
    unclipped, _ = clipped(network(name, size), lonely, 1e6, bf16=True)
    clip = float(unclipped.norm()) / 3
    total, _ = clipped(network(name, size), lonely, clip, bf16=True)
    assert abs(float(total.norm()) / clip - 1) < 2e-6
    # had the norm been taken in eight bits, it would be off by up to 2^-9


def test_bf16_takes_the_step_too():
    model, batch = network("dcgan", 28), Batch(chunk_of(28, 1).images, chunk_of(28, 1).labels, torch.arange(ROWS), ROWS)
    gradients = []
    for bf16 in (False, True):
        copied = copy.deepcopy(model)
        private = private_optimizer(copied, PrivacyConfig(), TrainConfig(), 0.0, 32.0, bf16=bf16)
        private_gradient(
            private, batch, batch.images[:4], batch.labels[:4], lambda shape, std: torch.zeros(shape).double()
        )
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in copied.parameters()]))
    assert 1e-6 < (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "size"), ARCHITECTURES)
def test_a_cuda_device_gives_the_sum_of_the_cpu(name, size):
    here, _ = clipped(network(name, size), chunk_of(size, 2), 1.0)
    there, _ = clipped(network(name, size).to("cuda"), chunk_of(size, 2), 1.0)
    assert (there.cpu() - here).norm() <= 1e-5 * here.norm()
