"""What the benchmark of one private step compares: an ordinary step, our engines, Opacus' modes, the noise alone.

Each is set up in a process of its own, from a cell and a name; what one leaves in the allocator moves no other.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
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
from common.config import GradientEngine, ImageConfig, ModelConfig, PrivacyConfig, TrainConfig
from common.crypto import KeyStream
from common.models import build
from common.noise import gaussian
from simulations.benchmark.turns import Step

PRIVACY, TRAIN = PrivacyConfig(), TrainConfig()
NOISE_MULTIPLIER = 1.0
CLASSES = 4
OPACUS_MODES = ("hooks", "functorch", "ew", "ghost")


@final
@dataclass(frozen=True)
class Cell:
    """One set of conditions.

    Attributes:
        size: Pixels along each side.
        batch: Patients in a step.
        fakes: Generated images beside them.
        model: The discriminator.
        device: Where it is trained.
        bf16: The fast engine's and the ordinary step's activations have eight bits.
    """

    size: int
    batch: int
    fakes: int
    model: ModelConfig
    device: str = "cpu"
    bf16: bool = False


@final
@dataclass(frozen=True)
class Data:
    """What every mode steps on: real patients with one image each, and fakes, maybe none."""

    batch: Batch
    fakes: Float[Tensor, "fakes 1 size size"]
    fake_labels: Int64[Tensor, " fakes"]


def set_up(cell: Cell, mode: str) -> Step:
    """Make everything that a mode needs, from scratch.

    Args:
        cell: The conditions.
        mode: `plain`, `fast`, `opacus ...` with one of `OPACUS_MODES`, `torch noise` or `secure noise`.
    """
    image = ImageConfig.model_validate({"size": cell.size})
    discriminator = build(cell.model, image, CLASSES, torch.Generator().manual_seed(0)).discriminator.to(cell.device)
    data = make_data(cell.size, cell.batch, cell.fakes, cell.device)
    torch.backends.cudnn.deterministic = True  # the bound on one patient needs it; for all alike
    if mode == "plain":
        return plain(discriminator, data, cell.bf16)
    if mode == "fast":
        return private(discriminator, data, "fast", torch_noise, bf16=cell.bf16)
    if mode.endswith("noise"):
        return _noise_alone(discriminator, data, mode)
    # The hooks sit on the first layer too, whose input, an image, needs no gradient.
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
    # Opacus' functorch sets autocast to a type that it does not have on the CPU, where it is off anyway.
    warnings.filterwarnings("ignore", message="In CPU autocast", category=UserWarning)
    return opacus(discriminator, data, mode.removeprefix("opacus "))


def plain(discriminator: nn.Module, data: Data, bf16: bool = False) -> Step:
    """Set up an ordinary step: one pass over reals and fakes, the mean loss; no clip, no noise."""
    images = torch.cat([data.batch.images, data.fakes])
    labels = torch.cat([data.batch.labels, data.fake_labels])
    signs = torch.cat([-torch.ones(len(data.batch.images)), torch.ones(len(data.fakes))]).to(images.device)
    adam = _adam(discriminator)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = discriminator(images, labels)
        F.softplus(signs * logits.float()).mean().backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def private(
    discriminator: nn.Module,
    data: Data,
    engine: GradientEngine,
    noise: Noise,
    noise_multiplier: float = NOISE_MULTIPLIER,
    bf16: bool = False,
) -> Step:
    """Set up a step of our own engine of that name."""
    divisor = float(data.batch.number_of_patients)
    mechanism = private_optimizer(discriminator, PRIVACY, TRAIN, noise_multiplier, divisor, engine, bf16)

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


@functools.cache  # so that data is no part of a step's memory
def make_data(size: int, patients: int, fakes: int, device: str = "cpu") -> Data:
    """Draw images and labels from a generator of their own; every patient has one image."""
    rng = torch.Generator().manual_seed(1)
    images = (torch.rand(patients + fakes, 1, size, size, generator=rng) * 2 - 1).to(device)
    labels = torch.randint(CLASSES, (patients + fakes,), generator=rng).to(device)
    batch = Batch(images[:patients], labels[:patients], torch.arange(patients), patients)
    return Data(batch, images[patients:], labels[patients:])


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


def _noise_alone(discriminator: nn.Module, data: Data, mode: str) -> Step:
    """Set up the noise of one step alone, in the shapes that the fast engine asks for."""
    asked: list[tuple[tuple[int, ...], float]] = []

    def listen(shape: tuple[int, ...], std: float) -> Tensor:
        asked.append((shape, std))
        return torch_noise(shape, std)

    private(discriminator, data, "fast", listen)()
    noise = torch_noise if mode == "torch noise" else functools.partial(gaussian, KeyStream.from_os())
    return lambda: _draw(noise, asked)


def _draw(noise: Noise, asked: Sequence[tuple[tuple[int, ...], float]]) -> None:
    for shape, std in asked:
        noise(shape, std)
