"""Patients in chunks of one fixed shape, whoever was sampled.

A chunk has the same number of rows always; each patient in it has the same number of adjacent rows, a power of two, and
what is left over is blank. So the place of an image and the company it is in change nothing of its gradient, and memory
does not grow with the batch. Out of scope: what is done with a chunk (step).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@final
@dataclass(frozen=True)
class Batch:
    """The images of the sampled patients, in [-1, 1]; may be empty. `patients` stays on the CPU, where it is packed.

    Attributes:
        images: One row an image.
        labels: Class numbers.
        patients: Row of the patient in this batch, 0 ... number_of_patients - 1.
        number_of_patients: Sampled patients. Sensitive: never leaves the step.
    """

    images: Float[Tensor, "images channels size size"]
    labels: Int64[Tensor, " images"]
    patients: Int64[Tensor, " images"]
    number_of_patients: int


@final
@dataclass(frozen=True)
class Chunk:
    """Images that pass the discriminator at a time.

    Attributes:
        images: One row an image; blank where there is none.
        labels: Class numbers.
        weights: Of an image in its patient's mean; 0 for a blank row.
        slots: Adjacent rows of one patient.
    """

    images: Float[Tensor, "rows channels size size"]
    labels: Int64[Tensor, " rows"]
    weights: Float[Tensor, " rows"]
    slots: int

    def to(self, device: torch.device) -> "Chunk":
        """Return the same on a device; nothing is copied where it is already there."""
        images, labels, weights = (
            part.to(device, non_blocking=True) for part in (self.images, self.labels, self.weights)
        )
        return Chunk(images, labels, weights, self.slots)


def pack(batch: Batch, rows: int) -> Iterator[list[Chunk]]:
    """Cut a batch into chunks.

    Args:
        batch: Sampled patients.
        rows: Images in every chunk, a power of two.

    Yields:
        One chunk of several patients, or the chunks of one patient with more than `rows` images.
    """
    counts = torch.bincount(batch.patients, minlength=batch.number_of_patients)
    order = torch.argsort(batch.patients, stable=True)
    starts = counts.cumsum(0) - counts
    slots_of = (2 ** torch.ceil(torch.log2(counts.double()))).long().clamp(max=2 * rows)
    for slots in torch.unique(slots_of[counts > 0]).tolist():
        members = torch.nonzero((slots_of == slots) & (counts > 0)).flatten()
        if slots <= rows:
            for part in members.split(rows // slots):
                places = (starts[part, None] + torch.arange(slots)).clamp(max=len(order) - 1)
                there = torch.arange(slots) < counts[part, None]
                yield [_chunk(batch, order[places], there / counts[part, None], slots, rows)]
            continue
        for start, count in zip(starts[members].tolist(), counts[members].tolist(), strict=True):
            pieces = order[start : start + count].split(rows)
            yield [_chunk(batch, piece[None], torch.full((1, len(piece)), 1 / count), rows, rows) for piece in pieces]


def _chunk(
    batch: Batch,
    index: Int64[Tensor, "patients slots"],
    weights: Float[Tensor, "patients slots"],
    slots: int,
    rows: int,
) -> Chunk:
    """Take images from their places; one of weight 0 is blank, and so is what is left of the rows."""
    used, device = index.numel(), batch.images.device
    all_weights = torch.zeros(rows)
    all_weights[:used] = weights.flatten()
    blank = torch.nonzero(all_weights == 0).flatten().to(device, non_blocking=True)
    chosen = index.flatten().to(device, non_blocking=True)
    images = batch.images.new_empty(rows, *batch.images.shape[1:])
    torch.index_select(batch.images, 0, chosen, out=images[:used])
    labels = batch.labels.new_empty(rows)
    torch.index_select(batch.labels, 0, chosen, out=labels[:used])
    return Chunk(images.index_fill_(0, blank, 0.0), labels.index_fill_(0, blank, 0), all_weights, slots)
