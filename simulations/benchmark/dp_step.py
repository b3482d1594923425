"""One private step of the discriminator: the fast engine beside an ordinary step and every mode of Opacus.

Seconds, noise and optimiser included, and peak memory, on one batch of real patients with one image each. Every engine
draws its noise from torch's generator, so that engines are compared; what secret noise costs on top is measured beside.
"""

import copy
import functools
import itertools
import math
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from opacus.grad_sample import GradSampleModule, GradSampleModuleExpandedWeights
from opacus.grad_sample import GradSampleModuleFastGradientClipping as GhostModule
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from client.dp import Batch, Noise, private_optimizer, private_step
from common.config import GradientEngine, ImageConfig, ModelConfig, PerformanceConfig, PrivacyConfig, TrainConfig
from common.crypto import KeyStream
from common.models import build
from common.noise import gaussian
from simulations.benchmark.report import Result
from simulations.benchmark.turns import Limits, Measured, SetUp, Step, figures, take_turns

MODEL, PRIVACY, TRAIN = ModelConfig(), PrivacyConfig(), TrainConfig()
LIMITS = Limits()
NOISE_MULTIPLIER = 1.0
CLASSES = 4
NOISE_SIZE = 32  # that of the default configuration
OPACUS_MODES = ("hooks", "functorch", "ew", "ghost")

Found = dict[tuple[int, int, int, str], Measured]  # by size, patients, fakes and mode


@final
@dataclass(frozen=True)
class Plan:
    """What is measured, how often; the defaults are the benchmark.

    Attributes:
        sizes: Pixels along each side.
        batches: Patients in a step, ascending.
        ratio_batch: The batch that ratios and rows with fakes are about.
        ratio_s: Seconds for which the modes take turns in a cell of the ratios, slow or not, at least.
        limits: In the other cells.
        model: The discriminator.
        threads: Of one tensor operation.
    """

    sizes: tuple[int, ...] = (28, 32, 64)
    batches: tuple[int, ...] = (32, 64, 128, 256, 512)
    ratio_batch: int = 128
    ratio_s: float = 10.0
    limits: Limits = LIMITS
    model: ModelConfig = MODEL
    threads: int = PerformanceConfig().threads


FULL = Plan()


@final
@dataclass(frozen=True)
class Data:
    """What every mode steps on: real patients with one image each, and fakes, maybe none."""

    batch: Batch
    fakes: Float[Tensor, "fakes 1 size size"]
    fake_labels: Int64[Tensor, " fakes"]


def measure(plan: Plan = FULL) -> Result:
    """Measure every mode at every size and batch, one cell after the other."""
    found: Found = {}
    with _settings(plan.threads):
        for size, batch in itertools.product(plan.sizes, plan.batches):
            print(f"dp-step: {size} px, batch {batch}", file=sys.stderr, flush=True)
            image, weights = ImageConfig.model_validate({"size": size}), torch.Generator().manual_seed(0)
            discriminator = build(plan.model, image, CLASSES, weights).discriminator
            data = make_data(size, batch, 0)
            steps = _plain_and_fast(discriminator, data) | _opacus_steps(discriminator, data)
            if (size, batch) == (NOISE_SIZE, plan.ratio_batch):
                steps |= _noise_steps(discriminator, data)
            _measure(plan, found, size, batch, 0, steps)
            if batch == plan.ratio_batch:
                steps = _plain_and_fast(discriminator, make_data(size, batch, batch))
                _measure(plan, found, size, batch, batch, steps)
    rows = [
        {"size": size, "batch": batch, "fakes": fakes, "mode": mode} | figures(one, found[size, batch, fakes, "plain"])
        for (size, batch, fakes, mode), one in found.items()
    ]
    return Result("dp-step", rows, _ratios(plan, found))


def plain(discriminator: nn.Module, data: Data) -> Step:
    """Set up an ordinary step: one pass over reals and fakes, the mean loss; no clip, no noise."""
    images = torch.cat([data.batch.images, data.fakes])
    labels = torch.cat([data.batch.labels, data.fake_labels])
    signs = torch.cat([-torch.ones(len(data.batch.images)), torch.ones(len(data.fakes))])
    adam = _adam(discriminator)

    def step() -> None:
        F.softplus(signs * discriminator(images, labels)).mean().backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def private(
    discriminator: nn.Module,
    data: Data,
    engine: GradientEngine,
    noise: Noise,
    noise_multiplier: float = NOISE_MULTIPLIER,
) -> Step:
    """Set up a step of our own engine of that name."""
    divisor = float(data.batch.number_of_patients)
    mechanism = private_optimizer(discriminator, PRIVACY, TRAIN, noise_multiplier, divisor, engine=engine)

    def step() -> None:
        private_step(mechanism, data.batch, data.fakes, data.fake_labels, noise)

    return step


def opacus(discriminator: nn.Module, data: Data, mode: str, noise_multiplier: float = NOISE_MULTIPLIER) -> Step:
    """Set up a step of Opacus on the reals, with its own optimiser around the same Adam.

    Args:
        discriminator: Changed in place.
        data: Without fakes.
        mode: Of `OPACUS_MODES`: per-sample gradients by hooks, functorch or expanded weights; or fast gradient clipping
            with ghost norms, two backward passes.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
    """
    images, labels = data.batch.images, data.batch.labels
    numbers: dict[str, Any] = {
        "noise_multiplier": noise_multiplier,
        "max_grad_norm": PRIVACY.max_grad_norm,
        "expected_batch_size": len(images),
    }
    adam, loss = _adam(discriminator), _LossOnReals()
    if mode == "ghost":
        module: Any = GhostModule(discriminator)
        module.max_grad_norm = PRIVACY.max_grad_norm
        optimizer = DPOptimizerFastGradientClipping(adam, **numbers)
        loss = DPLossFastGradientClipping(module, optimizer, loss)
    else:
        module = _with_gradients_by_image(discriminator, mode)
        optimizer = DPOptimizer(adam, **numbers)

    def step() -> None:
        loss(module(images, labels)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def torch_noise(shape: tuple[int, ...], std: float) -> Tensor:
    """Draw noise as Opacus' optimiser does, in single precision from torch's generator, and hand it over in double."""
    return torch.randn(shape).mul_(std).double()


@final
class _LossOnReals:
    """The mean loss; Opacus' ghost mode sets `reduction` to have it by image."""

    reduction = "mean"

    def __call__(self, logits: Float[Tensor, " images"]) -> Tensor:
        losses = F.softplus(-logits)
        return losses if self.reduction == "none" else losses.mean()


@final
class _ByRows(nn.Module):
    """An embedding that takes its indices as a column, for expanded weights refuse a vector of them."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, indices: Int64[Tensor, " images"]) -> Float[Tensor, "images channels"]:
        return self.embedding(indices[:, None])[:, 0]


def _with_gradients_by_image(discriminator: nn.Module, mode: str) -> nn.Module:
    if mode != "ew":
        return GradSampleModule(discriminator, force_functorch=mode == "functorch")
    for name, layer in list(discriminator.named_children()):
        if isinstance(layer, nn.Embedding):
            setattr(discriminator, name, _ByRows(layer))
    return GradSampleModuleExpandedWeights(discriminator)


def _adam(discriminator: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(discriminator.parameters(), lr=TRAIN.learning_rate_d, betas=(0.5, 0.999), fused=True)


def make_data(size: int, patients: int, fakes: int) -> Data:
    """Draw images and labels from a generator of their own; every patient has one image."""
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(patients + fakes, 1, size, size, generator=rng) * 2 - 1
    labels = torch.randint(CLASSES, (patients + fakes,), generator=rng)
    batch = Batch(images[:patients], labels[:patients], torch.arange(patients), patients)
    return Data(batch, images[patients:], labels[patients:])


def _plain_and_fast(discriminator: nn.Module, data: Data) -> dict[str, SetUp]:
    return {
        "plain": lambda: plain(copy.deepcopy(discriminator), data),
        "fast": lambda: private(copy.deepcopy(discriminator), data, "fast", torch_noise),
    }


def _opacus_steps(discriminator: nn.Module, data: Data) -> dict[str, SetUp]:
    return {f"opacus {mode}": functools.partial(_opacus_on_a_copy, discriminator, data, mode) for mode in OPACUS_MODES}


def _opacus_on_a_copy(discriminator: nn.Module, data: Data, mode: str) -> Step:
    return opacus(copy.deepcopy(discriminator), data, mode)


def _noise_steps(discriminator: nn.Module, data: Data) -> dict[str, SetUp]:
    """Set up the noise of one step alone, from either source, in the shapes that the fast engine asks for."""
    asked: list[tuple[tuple[int, ...], float]] = []

    def listen(shape: tuple[int, ...], std: float) -> Tensor:
        asked.append((shape, std))
        return torch_noise(shape, std)

    private(copy.deepcopy(discriminator), data, "fast", listen)()
    secret = KeyStream.from_os()
    return {
        "torch noise": lambda: lambda: _draw(torch_noise, asked),
        "secure noise": lambda: lambda: _draw(functools.partial(gaussian, secret), asked),
    }


def _draw(noise: Noise, asked: Sequence[tuple[tuple[int, ...], float]]) -> None:
    for shape, std in asked:
        noise(shape, std)


def _measure(plan: Plan, found: Found, size: int, batch: int, fakes: int, setups: dict[str, SetUp]) -> None:
    limits = plan.limits
    if batch == plan.ratio_batch:
        limits = replace(limits, at_least_s=plan.ratio_s, slow_s=math.inf)
    expected = {mode: _expected_bytes(found, size, batch, mode) for mode in setups}
    for mode, one in take_turns(setups, limits, expected).items():
        found[size, batch, fakes, mode] = one


def _expected_bytes(found: Found, size: int, batch: int, mode: str) -> float:
    """Expect as much for each patient as at smaller batches; 0 when there was none."""
    peaks = [one.peak_bytes / key[1] for key, one in found.items() if (key[0], key[3]) == (size, mode)]
    return batch * max(peaks, default=0.0)


def _ratios(plan: Plan, found: Found) -> dict[str, float]:
    """Put the figures of merit together, from the fastest steps at the ratios' batch without fakes."""
    cells = {
        (size, mode): one
        for (size, batch, fakes, mode), one in found.items()
        if (batch, fakes) == (plan.ratio_batch, 0)
    }
    fastest = {key: min(one.seconds) for key, one in cells.items() if not one.skipped}
    ratios: dict[str, float] = {}
    for size in (28, 64):
        best = min(fastest[size, f"opacus {mode}"] for mode in OPACUS_MODES if (size, f"opacus {mode}") in fastest)
        ratios[f"fast_over_plain_{size}"] = fastest[size, "fast"] / fastest[size, "plain"]
        ratios[f"opacus_best_over_plain_{size}"] = best / fastest[size, "plain"]
        ratios[f"fast_over_opacus_best_{size}"] = fastest[size, "fast"] / best
    ratios["fast_memory_over_plain_28"] = cells[28, "fast"].peak_bytes / cells[28, "plain"].peak_bytes
    extra = fastest[NOISE_SIZE, "secure noise"] - fastest[NOISE_SIZE, "torch noise"]
    ratios["secure_noise_share"] = extra / fastest[NOISE_SIZE, "fast"]
    return ratios


@contextmanager
def _settings(threads: int) -> Generator[None]:
    """Set the threads, and silence what torch says at every step of Opacus."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            # The hooks sit on the first layer too, whose input, an image, needs no gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            # Opacus' functorch sets autocast to a type that it does not have on the CPU, where it is off anyway.
            warnings.filterwarnings("ignore", message="In CPU autocast", category=UserWarning)
            yield
    finally:
        torch.set_num_threads(before)
