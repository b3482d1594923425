"""A lens of the warm-up: what one more release looks at, made from the generator as it stands, so from no patient.

A patient's bounded vector is spent best on what the generator gets wrong. A lens measures images from where its fakes
are: the lowest cosine coefficients, and what a small network that tells the fakes' classes apart sees in them, each
less the fakes' mean and over their spread. The coordinator makes it (server/lens) and every site looks through it;
whatever it holds, no vector is longer than 1. Out of scope: the public map of the first release (common/features).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, final, get_args

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from common.config import ImageConfig
from common.features import CONSTANT, LOW_COSINES, low_basis, pairs, products, shrink
from common.models import draw_weights
from common.weights import check_arrays

Sight = Literal["means", "learned"]
"""`means`: the means of the cosines. `learned`: also a network's features, and of both the products of all pairs."""

SIGHTS: tuple[Sight, ...] = get_args(Sight)

NETWORK_FEATURES = 96
_SIDE = 32
"""Larger images are averaged down to this side before the cosines."""
_MARGIN = 1e-4
"""Keeps the norm under 1 when floats round up."""


@final
@dataclass(frozen=True)
class Lens:
    """Where to look from, in public numbers.

    Attributes:
        image: What an image is.
        centre: Mean coordinates of each class of fakes.
        scale: Positive: what is length 1 in each coordinate.
        network: Images to features; None with `means`.
    """

    image: ImageConfig
    centre: Float[Tensor, "classes width"]
    scale: Float[Tensor, " width"]
    network: nn.Sequential | None

    @property
    def sight(self) -> Sight:
        """What this lens sees."""
        return "means" if self.network is None else "learned"


def make_network(image: ImageConfig) -> nn.Sequential:
    """Build the network of a lens, its weights not yet drawn; the layer behind it tells classes apart."""
    return nn.Sequential(
        nn.Conv2d(image.channels, 24, 5, stride=2, padding=2),
        nn.GroupNorm(4, 24),
        nn.LeakyReLU(0.1),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.GroupNorm(4, 48),
        nn.LeakyReLU(0.1),
        nn.Conv2d(48, 64, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.AdaptiveAvgPool2d(8) if image.size > _SIDE else nn.Identity(),
        nn.Flatten(),
        nn.Linear(64 * min(8, image.size // 4) ** 2, NETWORK_FEATURES),
        nn.LeakyReLU(0.1),
    )


def plain_lens(image: ImageConfig, sight: Sight) -> Lens:
    """Make a lens of numbers of our own: random weights from a fixed seed, nothing taken off, nothing scaled."""
    network = None
    if sight == "learned":
        with torch.device("meta"):
            network = make_network(image)
        network = cast("nn.Sequential", draw_weights(network, torch.Generator().manual_seed(0)))
        network.eval().requires_grad_(False)
    width = sum(_widths(image, sight))
    return Lens(image, torch.zeros(len(image.classes), width), torch.ones(width), network)


def lens_dim(image: ImageConfig, sight: Sight) -> int:
    """Return the length of one vector seen through a lens."""
    return 1 + sum(pairs(width) if sight == "learned" else width for width in _widths(image, sight))


def coordinates(
    network: nn.Sequential | None, images: Float[Tensor, "batch channels size size"]
) -> Float[Tensor, "batch width"]:
    """Measure images before anything is taken off: cosines, then the network's features."""
    seen = [_cosines(images)]
    if network is not None:
        seen.append(network(images))
    return torch.cat(seen, dim=1)


def look(
    lens: Lens, images: Float[Tensor, "batch channels size size"], labels: Int64[Tensor, " batch"]
) -> Float[Tensor, "batch dim"]:
    """Map images of known classes to vectors.

    Args:
        lens: What to look through.
        images: Pixels in [-1, 1].
        labels: Their class numbers.

    Returns:
        One vector per image; the first coordinate is the constant `CONSTANT`. Not finite where
        the lens's numbers overflow.

    Guarantees:
        - unit_norm: Every finite vector has an L2 norm of at most 1, whatever images and lens are.
        - differentiable: Gradients with respect to the pixels are finite.
    """
    offsets = (coordinates(lens.network, images) - lens.centre[labels]) / lens.scale
    blocks: list[Tensor] = []
    for block in offsets.split(_widths(lens.image, lens.sight), dim=1):
        inside = block / block.norm(dim=1, keepdim=True).clamp(min=1)
        blocks.append(inside)
        if lens.sight == "learned":
            blocks.append(products(inside))
    constant = torch.full((len(images), 1), CONSTANT, dtype=images.dtype)
    share = math.sqrt((1 - CONSTANT**2 - _MARGIN) / len(blocks))
    return torch.cat([constant, *(block * share for block in blocks)], dim=1)


def to_arrays(lens: Lens) -> dict[str, npt.NDArray[Any]]:
    """Return a lens in the form in which it travels."""
    arrays = {"lens.centre": lens.centre.numpy(), "lens.scale": lens.scale.numpy()}
    if lens.network is not None:
        arrays |= {f"lens.network.{name}": p.detach().numpy() for name, p in lens.network.named_parameters()}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def from_arrays(image: ImageConfig, sight: Sight, arrays: Mapping[str, npt.NDArray[Any]]) -> Lens:
    """Read a lens strictly.

    Args:
        image: What an image is.
        sight: Decides which arrays there must be.
        arrays: Whatever arrived.

    Raises:
        WireError: The arrays are not exactly those of such a lens, float32 and finite.
    """
    with torch.device("meta"):  # no weights are drawn only to be replaced
        network = make_network(image) if sight == "learned" else None
    width = sum(_widths(image, sight))
    shapes: dict[str, tuple[int, ...]] = {"lens.centre": (len(image.classes), width), "lens.scale": (width,)}
    named = {} if network is None else dict(network.named_parameters())
    shapes |= {f"lens.network.{name}": tuple(parameter.shape) for name, parameter in named.items()}
    check_arrays(arrays, shapes)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    if network is not None:
        network.to_empty(device="cpu")
        network.load_state_dict({name: tensors[f"lens.network.{name}"] for name in named})
        network.eval().requires_grad_(False)
    smallest = torch.finfo(torch.float32).tiny  # no matter of privacy, but a division by 0 would see nothing
    return Lens(image, tensors["lens.centre"], tensors["lens.scale"].abs().clamp(min=smallest), network)


def low_pass(images: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch channels size size"]:
    """Keep of images what their lowest cosine coefficients say."""
    basis = low_basis(images.shape[-1])
    return (images.flatten(2) @ basis @ basis.T).view_as(images)


def _widths(image: ImageConfig, sight: Sight) -> list[int]:
    cosines = LOW_COSINES * image.channels
    return [cosines] if sight == "means" else [cosines, NETWORK_FEATURES]


def _cosines(images: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch cosines"]:
    small = shrink(images, _SIDE)
    return (small.flatten(2) @ low_basis(small.shape[-1])).flatten(1)
