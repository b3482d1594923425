"""How each kind of layer makes its parameters' gradients out of what came in and the gradient of what went out.

The gradient of a matrix is a sum over positions (pixels, tokens, several images of one patient) of an output's gradient
times an input; these two factors are what a layer gives, patient by patient. Out of scope: their product (fast).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from common.errors import ConfigError

Copy = Callable[[Tensor], Tensor]
"""Copies values into contiguous memory; valid until the next copy."""


@final
@dataclass(frozen=True)
class Vector:
    """Every patient's gradient of one parameter that is no matrix."""

    parameter: nn.Parameter
    values: Float[Tensor, "patients numbers"]


@final
@dataclass(frozen=True)
class Matrix:
    """The factors of every patient's gradient of one matrix; a convolution's has its channels last."""

    parameter: nn.Parameter
    outputs: Float[Tensor, "patients positions out"]
    inputs: Float[Tensor, "patients positions in_"]


Parts = Iterator[Vector | Matrix]


def parts_of(layer: nn.Module, came_in: Tensor, gradient: Tensor, slots: int, copy: Copy) -> Parts:
    """Return what a layer's parameters get from each patient.

    Args:
        layer: Of a type in `LAYERS`.
        came_in: The layer's input; `slots` adjacent rows for each patient.
        gradient: Of the layer's output.
        slots: Rows of one patient.
        copy: Gives memory for patches.

    Yields:
        One part per parameter. What was copied for it is gone when the next one is asked for.
    """
    return LAYERS[type(layer)](layer, came_in, gradient, slots, copy)


def check_layers(discriminator: nn.Module) -> None:
    """Refuse a discriminator with a layer whose gradients the engine does not know, or that mixes patients.

    Raises:
        ConfigError: Names the first such layer and its type.

    Guarantees:
        - refused_by_name: Every layer is of a known type exactly; a subclass may compute something else.
    """
    for name, layer in discriminator.named_modules():
        own = next(layer.parameters(recurse=False), None) is not None
        leaf = next(layer.children(), None) is None
        known = type(layer) in LAYERS or (not own and (not leaf or isinstance(layer, _WITHOUT_PARAMETERS)))
        if not known or getattr(layer, "inplace", False) or not _plain(layer):
            kinds = ", ".join(kind.__name__ for kind in LAYERS)
            raise ConfigError(
                f"Expected a discriminator of {kinds} (no groups, zero padding in numbers) and activations that are "
                f"not in place, got {layer} as {name or 'the whole'}. Its gradients by patient are not known."
            )


_WITHOUT_PARAMETERS = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Upsample,
)


def _plain(layer: Any) -> bool:
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.Embedding):
        return (
            layer.padding_idx is None and layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
        )
    return True


def _linear(layer: Any, came_in: Tensor, gradient: Tensor, slots: int, copy: Copy) -> Parts:
    del copy
    patients = len(gradient) // slots
    outputs = gradient.reshape(patients, -1, layer.out_features)
    yield Matrix(layer.weight, outputs, came_in.reshape(patients, -1, layer.in_features))
    if layer.bias is not None:
        yield Vector(layer.bias, outputs.sum(1))


def _embedding(layer: Any, came_in: Tensor, gradient: Tensor, slots: int, copy: Copy) -> Parts:
    del copy
    patients = len(gradient) // slots
    rows = torch.arange(layer.num_embeddings, device=came_in.device)
    chosen = (came_in[..., None] == rows).to(gradient.dtype).reshape(patients, -1, layer.num_embeddings)
    yield Matrix(layer.weight, chosen, gradient.reshape(patients, -1, layer.embedding_dim))


def _conv2d(layer: Any, came_in: Tensor, gradient: Tensor, slots: int, copy: Copy) -> Parts:
    outputs = _positions(gradient, slots)
    yield Matrix(layer.weight, outputs, _patches(came_in, layer, gradient, slots, copy))
    if layer.bias is not None:
        yield Vector(layer.bias, outputs.sum(1))


def _conv_transpose2d(layer: Any, came_in: Tensor, gradient: Tensor, slots: int, copy: Copy) -> Parts:
    # The transposed convolution is the backward pass of a convolution: what came in and what went out change places.
    yield Matrix(layer.weight, _positions(came_in, slots), _patches(gradient, layer, came_in, slots, copy))
    if layer.bias is not None:
        yield Vector(layer.bias, _positions(gradient, slots).sum(1))


def _group_norm(layer: Any, came_in: Tensor, gradient: Tensor, slots: int, copy: Copy) -> Parts:
    del copy
    normalised = F.group_norm(came_in, layer.num_groups, eps=layer.eps)
    shape = (len(gradient) // slots, slots, layer.num_channels, -1)
    if layer.weight is not None:
        yield Vector(layer.weight, (normalised * gradient).reshape(shape).sum((1, 3)))
    if layer.bias is not None:
        yield Vector(layer.bias, gradient.reshape(shape).sum((1, 3)))


def _layer_norm(layer: Any, came_in: Tensor, gradient: Tensor, slots: int, copy: Copy) -> Parts:
    del copy
    normalised = F.layer_norm(came_in, layer.normalized_shape, eps=layer.eps)
    shape = (len(gradient) // slots, -1, math.prod(layer.normalized_shape))
    if layer.weight is not None:
        yield Vector(layer.weight, (normalised * gradient).reshape(shape).sum(1))
    if layer.bias is not None:
        yield Vector(layer.bias, gradient.reshape(shape).sum(1))


LAYERS: Mapping[type[nn.Module], Callable[..., Parts]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.Conv2d: _conv2d,
    nn.ConvTranspose2d: _conv_transpose2d,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}
"""Layers with parameters whose gradients are known."""


def _positions(
    values: Float[Tensor, "rows channels height width"], slots: int
) -> Float[Tensor, "patients positions channels"]:
    rows, channels = values.shape[:2]
    return values.permute(0, 2, 3, 1).reshape(rows // slots, -1, channels)


def _patches(
    values: Float[Tensor, "rows channels height width"],
    layer: Any,
    places: Float[Tensor, "rows other lines points"],
    slots: int,
    copy: Copy,
) -> Float[Tensor, "patients positions in_"]:
    """Copy the patch under the kernel at every place, channels last within a patch."""
    (pad_y, pad_x), (step_y, step_x), (gap_y, gap_x) = layer.padding, layer.stride, layer.dilation
    (kernel_y, kernel_x), (rows, channels, height, width) = layer.kernel_size, values.shape
    lines, points = places.shape[2:]
    below = max(0, (lines - 1) * step_y + (kernel_y - 1) * gap_y + 1 - height - pad_y)
    right = max(0, (points - 1) * step_x + (kernel_x - 1) * gap_x + 1 - width - pad_x)
    padded = F.pad(values.permute(0, 2, 3, 1), (0, 0, pad_x, right, pad_y, below)).contiguous()
    row, line, point, _ = padded.stride()
    if channels == 1:  # runs of one number are copied faster with the places last
        windows = padded.as_strided(
            (rows // slots, slots, kernel_y, kernel_x, lines, points),
            (row * slots, row, line * gap_y, point * gap_x, line * step_y, point * step_x),
        )
        copied = copy(windows.permute(0, 2, 3, 1, 4, 5))
        return copied.view(rows // slots, kernel_y * kernel_x, -1).transpose(1, 2)
    windows = padded.as_strided(
        (rows, lines, points, kernel_y, kernel_x, channels),
        (row, line * step_y, point * step_x, line * gap_y, point * gap_x, 1),
    )
    return copy(windows).view(rows // slots, slots * lines * points, -1)
