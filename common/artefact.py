"""The generator as a run leaves it: weights and description on disk, and drawing images from it.

Post-processing of what was released, so nothing here costs privacy. Out of scope: training, files of images.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64, UInt8
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch import Tensor, nn

from common.config import Config, ImageConfig, ModelConfig, Section
from common.errors import ResumeError, WireError
from common.files import write_atomic
from common.models import build
from common.weights import check_arrays

MAX_INFO_BYTES = 4 * 1024**2
_HEADER_BYTES = 65_536


@final
class GeneratorInfo(Section):
    """What generator.json says of the weights beside it."""

    version: Literal[1] = 1
    model: ModelConfig
    image: ImageConfig
    value_range: tuple[float, float] = (-1.0, 1.0)
    run_id: str
    config_digest: str
    rounds: int = Field(ge=0)
    epsilon_by_site: dict[str, float]
    delta: float
    sha256: str
    license: str | None = None


def draw(
    generator: nn.Module, labels: Int64[Tensor, " count"], latent_dim: int, rng: torch.Generator, batch: int = 256
) -> UInt8[np.ndarray, "count size size *colours"]:
    """Draw one image for each label.

    Args:
        generator: Maps (latent, labels) to images in [-1, 1].
        labels: Class numbers, at least one.
        latent_dim: Length of a latent vector.
        rng: The only source of randomness.
        batch: Images computed at a time.

    Returns:
        Pixels from 0 (for -1) to 255 (for 1), rounded, as `pictures` gives them.

    Guarantees:
        - same_again: Equal weights, labels and generator states give equal images.
        - leaves_no_trace: The generator is in the same mode afterwards, and holds no gradients.
    """
    was_training = generator.training
    generator.eval()
    parts: list[npt.NDArray[np.uint8]] = []
    with torch.no_grad():
        for chunk in labels.split(batch):
            images = generator(torch.randn(len(chunk), latent_dim, generator=rng), chunk)
            parts.append(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())
    generator.train(was_training)
    return pictures(np.concatenate(parts))


def pictures(images: UInt8[np.ndarray, "count channels size size"]) -> UInt8[np.ndarray, "count size size *colours"]:
    """Put pixels as files hold them: grey without an axis of channels, colour with red, green and blue last."""
    return images[:, 0] if images.shape[1] == 1 else np.ascontiguousarray(np.moveaxis(images, 1, 3))


def save_generator(
    folder: Path,
    generator: nn.Module,
    config: Config,
    run_id: str,
    rounds: int,
    epsilon_by_site: Mapping[str, float],
) -> GeneratorInfo:
    """Write generator.safetensors, and generator.json that says what is in it.

    Args:
        folder: A run folder.
        generator: The result.
        config: The run's configuration, with its classes.
        run_id: The run.
        rounds: Finished rounds; round 0 is not counted.
        epsilon_by_site: What each site reported as spent.

    Raises:
        StorageError: A file could not be written.
    """
    weights = {name: parameter.detach().numpy() for name, parameter in generator.named_parameters()}
    content = save_tensors({name: np.ascontiguousarray(array) for name, array in weights.items()})
    info = GeneratorInfo(
        model=config.model,
        image=config.image,
        run_id=run_id,
        config_digest=config.digest(),
        rounds=rounds,
        epsilon_by_site=dict(epsilon_by_site),
        delta=config.privacy.delta,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    write_atomic(folder / "generator.safetensors", content)
    write_atomic(folder / "generator.json", info.model_dump_json(indent=2).encode())
    return info


def load_generator(folder: Path) -> tuple[nn.Module, GeneratorInfo]:
    """Load the generator that a run left.

    Raises:
        ResumeError: No generator stands in the folder.
        WireError: A file is damaged, too large, of another version, or the two do not belong together.

    Guarantees:
        - bounded: No more is read than the described model needs.
        - belongs: Weights whose SHA-256 is not the one in generator.json are refused.
    """
    info = load_info(folder)
    rng = torch.Generator().manual_seed(0)
    generator = build(info.model, info.image, len(info.image.classes), rng).generator
    expected = {name: tuple(parameter.shape) for name, parameter in generator.named_parameters()}
    limit = sum(4 * math.prod(shape) for shape in expected.values()) + _HEADER_BYTES
    content = _read_bounded(folder / "generator.safetensors", limit)
    if hashlib.sha256(content).hexdigest() != info.sha256:
        raise WireError(
            f"Expected generator.safetensors with the SHA-256 that generator.json in {folder} states, got another. "
            "Copy both files again from the run that made them."
        )
    arrays = _decode(content)
    check_arrays(arrays, expected)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[name].copy()))
    return generator, info


def load_info(folder: Path) -> GeneratorInfo:
    """Read generator.json.

    Raises:
        ResumeError: No generator stands in the folder.
        WireError: The file does not decode strictly.
    """
    content = _read_bounded(folder / "generator.json", MAX_INFO_BYTES)
    try:
        info = GeneratorInfo.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise WireError(
            f"generator.json in {folder} does not decode: {where}: {first['msg']}. "
            "Copy it again from the run that made it, or use the release that wrote it."
        ) from error
    if not info.image.classes:
        raise WireError(f"generator.json in {folder} names no classes. Copy it again from the run that made it.")
    return info


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as handle:
            content = handle.read(limit + 1)
    except OSError as error:
        raise ResumeError(
            f"No generator stands in {path.parent} ({path.name}: {error.strerror}). "
            "Name the folder of a finished run, or finish the run with --resume."
        ) from error
    if len(content) > limit:
        raise WireError(f"Expected {path.name} of at most {limit} bytes, got more. Copy it again from its run.")
    return content


def _decode(content: bytes) -> dict[str, npt.NDArray[Any]]:
    try:
        return load_tensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WireError(
            f"generator.safetensors does not decode ({type(error).__name__}). Copy it again from the run that made it."
        ) from error
