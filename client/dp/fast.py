"""The fast engine: gradients of patients from one ordinary backward pass, without Opacus.

The pass gives gradients of layer outputs only. In each layer they meet what came in: in a matrix product per patient,
or, where that costs more, not at all (the two factors are kept). Convolutions work on channels-last patches, so that a
patch is copied once and multiplied once. Out of scope: clip and sum (contributions), noise (step).
"""

import functools
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from client.dp.contributions import Contribution, Formed, Product, Unformed
from client.dp.engine import Engine, Loss
from client.dp.layers import LAYERS, Matrix, Vector, check_layers, parts_of
from client.dp.packing import Chunk

_SMALL = 1024
_FEW_PATIENTS, _FEW_NUMBERS = 24, 1 << 20
"""How much of the largest matrix is formed at a time: the fewer, the less memory, and the more calls."""

_CACHED = 1 << 16
_MEMORY_COST = (12, 40)
"""What writing and reading one number of a formed gradient costs, in multiplications: in a cache, and out of it."""


@final
@dataclass(frozen=True)
class _Record:
    layer: nn.Module
    came_in: Tensor
    output: Tensor


@final
class FastEngine(Engine):
    """Gradients by book-keeping; its memory is used again by every chunk, for fresh pages cost more than arithmetic.

    In the flat gradient small parameters come first, and convolution weights have their channels last.
    """

    def __init__(self, discriminator: nn.Module, rows: int, bf16: bool = False) -> None:
        """Check the layers and reserve memory.

        Args:
            discriminator: Converted to channels-last in place.
            rows: Images in a chunk.
            bf16: Let activations and their gradients have eight bits; gradients of parameters and norms have 24.

        Raises:
            ConfigError: A layer is not supported; it is named.
        """
        check_layers(discriminator)
        self._rows, self._layers = rows, [layer for layer in discriminator.modules() if type(layer) in LAYERS]
        self._discriminator = discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._parameters = parameters = list(discriminator.parameters())
        small = [p for p in parameters if p.numel() <= _SMALL]
        large = sorted((p for p in parameters if p.numel() > _SMALL), key=lambda parameter: parameter.numel())
        sizes = torch.tensor([0, *(parameter.numel() for parameter in [*small, *large])])
        self._starts = dict(zip([*small, *large], sizes.cumsum(0)[:-1].tolist(), strict=True))
        device = parameters[0].device
        self._precision = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
        self._small = torch.empty(rows, sum(parameter.numel() for parameter in small), device=device)
        self._largest = [*small, *large][-1]
        self._large = torch.empty(rows * sum(p.numel() for p in large if p is not self._largest), device=device)
        size = self._largest.numel()
        self._few = max(size, min(_FEW_PATIENTS * size, _FEW_NUMBERS))
        self._work = torch.empty(self._few, device=device)

    def contributions(self, loss: Loss, chunk: Chunk) -> tuple[list[Contribution], Unformed | None]:
        """Return small parameters as one contribution, one for each large one, and the largest apart.

        Arguments as in `Engine`.
        """
        with _recorded(self._layers) as records, self._precision:
            logits = self._discriminator(chunk.images.contiguous(memory_format=torch.channels_last), chunk.labels)
        total = torch.dot(chunk.weights, loss(logits.float()))
        gradients = torch.autograd.grad(total, [record.output for record in records])
        parts: list[Contribution] = [Formed(self._small[: len(chunk.images) // chunk.slots], 0)]
        last: Unformed | None = None
        seen: set[nn.Parameter] = set()
        for record, gradient in sorted(zip(records, gradients, strict=True), key=lambda pair: self._is_last(pair[0])):
            copy = functools.partial(self._copy, behind=self._few if self._is_last(record) else 0)
            came_in = record.came_in.float() if record.came_in.is_floating_point() else record.came_in
            for part in parts_of(record.layer, came_in, gradient.float(), chunk.slots, copy):
                if part.parameter in seen:
                    raise RuntimeError("Expected every layer to be used once in the discriminator.")
                seen.add(part.parameter)
                last = self._place(part, parts) or last
        if len(seen) < len(self._starts):
            raise RuntimeError("Expected every layer to be used once in the discriminator.")
        return parts, last

    def by_parameter(self, gradient: Float[Tensor, " gradient"]) -> list[Tensor]:
        """Cut the flat gradient into the shapes of the parameters, in their order."""
        parts: list[Tensor] = []
        for parameter in self._parameters:
            start, shape = self._starts[parameter], parameter.shape
            part = gradient[start : start + parameter.numel()]
            if parameter.dim() == 4:
                parts.append(part.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2))
            else:
                parts.append(part.view(shape))
        return parts

    def _place(self, part: Vector | Matrix, parts: list[Contribution]) -> Unformed | None:
        """Multiply a part out, or leave it as two factors where that is cheaper, and add it to the contributions.

        The largest matrix comes last and is returned instead: what is copied for it stays.
        """
        start, count = self._starts[part.parameter], part.parameter.numel()
        if count <= _SMALL:
            values = part.values if isinstance(part, Vector) else part.outputs.transpose(1, 2) @ part.inputs
            self._small[: len(values), start : start + count] = values.flatten(1)
        elif isinstance(part, Vector):
            parts.append(Formed(part.values, start))
        elif _cheaper_unformed(part):
            parts.append(Product(part.outputs.double(), part.inputs.double(), start))
        elif part.parameter is self._largest:
            return Unformed(part.outputs, part.inputs, start, self._work[-self._few :])
        else:
            patients, first = len(part.outputs), self._rows * (start - self._small.shape[1])
            values = self._large[first : first + patients * count].view(patients, part.outputs.shape[2], -1)
            torch.bmm(part.outputs.transpose(1, 2), part.inputs, out=values)
            parts.append(Formed(values.flatten(1), start))
        return None

    def _is_last(self, record: _Record) -> bool:
        return any(parameter is self._largest for parameter in record.layer.parameters(recurse=False))

    def _copy(self, values: Tensor, behind: int) -> Tensor:
        """Copy values, contiguous in the order of their dimensions, into memory that the next copy overwrites.

        Args:
            values: May be overlapping windows.
            behind: Numbers to leave free at the end.
        """
        if self._work.numel() < values.numel() + behind:
            self._work = torch.empty(0, device=self._work.device)  # else both are held for a moment
            self._work = torch.empty(values.numel() + behind, device=self._work.device)
        return self._work[: values.numel()].view(values.shape).copy_(values)


def _cheaper_unformed(part: Matrix) -> bool:
    positions, size_out, size_in = part.inputs.shape[1], part.outputs.shape[2], part.inputs.shape[2]
    count = size_out * size_in
    forming = count * (positions + _MEMORY_COST[count > _CACHED])
    factors = 3 * positions * (count + positions * (size_out + size_in))  # in double precision
    return factors < forming


@contextmanager
def _recorded(layers: list[nn.Module]) -> Generator[list[_Record]]:
    """Keep what comes into each layer with parameters and what goes out, as long as the context lasts."""
    records: list[_Record] = []

    def record(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        records.append(_Record(layer, arguments[0].detach(), output))

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
