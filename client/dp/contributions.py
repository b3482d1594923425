"""What the patients of one chunk contribute to a part of the gradient: their norms, and their clipped sum.

The gradient is one flat vector; a contribution says where in it it starts. Two forms: `Formed` holds every patient's
gradient, `Product` holds its two factors. Out of scope: who computes them (fast, reference), what is added (step).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_BLOCK = 2048
_TOGETHER = 8
_LEAST_SHARE = 2.0**-20
_LONGEST = 1e18  # beyond, the factor nears the smallest floats and is no longer exact


@final
@dataclass(frozen=True)
class Formed:
    """Every patient's gradient of some parameters, held whole in single precision.

    Attributes:
        values: One row a patient.
        start: Where in the flat gradient a row belongs.
    """

    values: Float[Tensor, "patients numbers"]
    start: int

    def squared_norms(self) -> Float64[Tensor, " patients"]:
        """Return the squares of the patients' norms: blocks in single precision, put together in double.

        Over millions of numbers a norm taken in single precision comes out short, by 6 % for 16 million of them.
        """
        size = self.values.shape[1]
        if size % _BLOCK == 0:
            return torch.linalg.vector_norm(self.values.unflatten(1, (-1, _BLOCK)), dim=2).double().square().sum(1)
        blocks = [torch.linalg.vector_norm(block, dim=1) for block in self.values.split(_BLOCK, dim=1)]
        return torch.stack(blocks).double().square().sum(0)

    def add_clipped(self, total: Float64[Tensor, " gradient"], factors: Float64[Tensor, " patients"]) -> None:
        """Add the patients' gradients, each times its factor, to the flat sum: by eights, then in double.

        What one patient more or less changes in rounding is at most 2^-20 of the clipping norm for each patient.
        """
        values, size = self.values, self.values.shape[1]
        if len(values) > _TOGETHER and len(values) % _TOGETHER == 0:
            eights = factors.float().view(-1, 1, _TOGETHER) @ values.unflatten(0, (-1, _TOGETHER))
            total[self.start : self.start + size] += eights.sum((0, 1), dtype=torch.float64)
            return
        for some in range(0, len(values), _TOGETHER):
            part = factors[some : some + _TOGETHER].float() @ values[some : some + _TOGETHER]
            total[self.start : self.start + size] += part

    def without(self, patients: Tensor) -> "Formed":
        """Return the same with nothing of some patients."""
        return Formed(self.values.masked_fill(patients[:, None], 0.0), self.start)


@final
@dataclass(frozen=True)
class Product:
    """Every patient's gradient of one matrix as its factors: outputs' gradients and inputs, position by position.

    In double precision, for inner products lose digits where positions cancel.

    Attributes:
        outputs: Gradients of the layer's outputs.
        inputs: What came into the layer.
        start: Where in the flat gradient the matrix belongs.
    """

    outputs: Float64[Tensor, "patients positions out"]
    inputs: Float64[Tensor, "patients positions in_"]
    start: int

    def squared_norms(self) -> Float64[Tensor, " patients"]:
        """Return the squares of the patients' norms, by the inner products of positions.

        Where positions cancel to less than a millionth of their lengths, a millionth of those stands in: the true norm
        is lost in rounding, and one too long is safe.

        Source: Goodfellow 2015 (arXiv:1510.01799) for one position; Bu et al. 2023 (arXiv:2210.00038) for many.
        """
        outputs = self.outputs @ self.outputs.transpose(1, 2)
        inputs = self.inputs @ self.inputs.transpose(1, 2)
        lengths = (outputs.diagonal(dim1=1, dim2=2) * inputs.diagonal(dim1=1, dim2=2)).sqrt().sum(1)
        return (outputs * inputs).sum((1, 2)).maximum((_LEAST_SHARE * lengths).square())

    def add_clipped(self, total: Float64[Tensor, " gradient"], factors: Float64[Tensor, " patients"]) -> None:
        """Add the patients' gradients, each times its factor, to the flat sum."""
        scaled = (self.outputs * factors[:, None, None]).flatten(0, 1)
        matrix = scaled.T @ self.inputs.flatten(0, 1)
        total[self.start : self.start + matrix.numel()] += matrix.flatten()

    def without(self, patients: Tensor) -> "Product":
        """Return the same with nothing of some patients."""
        gone = patients[:, None, None]
        return Product(self.outputs.masked_fill(gone, 0.0), self.inputs.masked_fill(gone, 0.0), self.start)


@final
@dataclass(frozen=True)
class Unformed:
    """Every patient's gradient of one matrix as its factors, to be formed for a few patients at a time.

    Attributes:
        outputs: Gradients of the layer's outputs.
        inputs: What came into the layer.
        start: Where in the flat gradient the matrix belongs.
        memory: For the matrices of those few patients.
    """

    outputs: Float[Tensor, "patients positions out"]
    inputs: Float[Tensor, "patients positions in_"]
    start: int
    memory: Float[Tensor, " numbers"]

    def few(self) -> Iterator[tuple[slice, Formed]]:
        """Yield some patients and what they contribute; the next ones overwrite it."""
        size = self.outputs.shape[2] * self.inputs.shape[2]
        most = max(1, len(self.memory) // size)
        most -= most % _TOGETHER if most > _TOGETHER else 0
        for start in range(0, len(self.outputs), most):
            some = slice(start, min(start + most, len(self.outputs)))
            outputs, inputs = self.outputs[some], self.inputs[some]
            values = self.memory[: len(outputs) * size].view(len(outputs), outputs.shape[2], inputs.shape[2])
            torch.bmm(outputs.transpose(1, 2), inputs, out=values)
            yield some, Formed(values.flatten(1), self.start)


Contribution = Formed | Product


def add_clipped(
    total: Float64[Tensor, " gradient"],
    contributions: list[Contribution],
    last: Unformed | None,
    max_grad_norm: float,
) -> None:
    """Clip each patient's gradient to a norm over all contributions and add them up.

    A patient whose gradient overflows, or is too long to be shortened exactly, counts as zero.

    Args:
        total: The flat sum, added to in place.
        contributions: All of the gradient but `last`.
        last: Formed and added a few patients at a time, while they are in the cache.
        max_grad_norm: Bound on each patient's norm.
    """
    squared = torch.stack([part.squared_norms() for part in contributions]).sum(0)
    factors = torch.zeros_like(squared)
    for some, part in [(slice(None), None)] if last is None else last.few():
        norms = (squared[some] + (0.0 if part is None else part.squared_norms())).sqrt()
        factors[some] = torch.where(norms < _LONGEST, max_grad_norm / norms.clamp(min=max_grad_norm), 0.0)
        if part is not None:
            _add(total, part, factors[some])
    for part in contributions:
        _add(total, part, factors)


def _add(total: Float64[Tensor, " gradient"], part: Contribution, factors: Float64[Tensor, " patients"]) -> None:
    gone = factors == 0
    if gone.device.type != "cpu" or gone.any():  # zero times infinity is not zero; asking would stop other devices
        part = part.without(gone)
    part.add_clipped(total, factors)
