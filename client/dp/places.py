"""Whether this machine computes the same, to the last bit, at every place of a chunk.

The bound on one patient's influence needs it: a patient who joins moves others to other places, and weights chosen to
magnify rounding would turn a difference of one bit into whole clipping norms. Matrix products of some shapes round
their rows differently (on one machine: two rows), so what a shape does is tried before it is used.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.dp.contributions import Formed
from client.dp.engine import Engine
from client.dp.packing import Chunk

_DRAWS = 3


def same_at_every_place(make: Callable[[nn.Module], Engine], discriminator: nn.Module, rows: int, size: int) -> bool:
    """Try random images and weights at all places of chunks of `rows` images, for every number of slots.

    Args:
        make: Makes the engine that is tried.
        discriminator: Its layers are tried, not its weights.
        rows: Images in a chunk.
        size: Side of an image in pixels.

    Returns:
        Whether all patients of the same images contribute the same bits and have norms of the same bits.
    """
    rng = torch.Generator().manual_seed(0)
    tried = copy.deepcopy(discriminator)
    engine, device = make(tried), next(tried.parameters()).device
    for slots in [1 << power for power in range(rows.bit_length() - 1)]:
        for _ in range(_DRAWS):
            _fill(tried, rng)
            images = torch.rand(slots, 1, size, size, generator=rng).mul_(2).sub_(1).repeat(rows // slots, 1, 1, 1)
            weights = torch.full((rows,), 1 / slots)
            chunk = Chunk(images, torch.zeros(rows, dtype=torch.int64), weights, slots)
            if not _all_the_same(engine, chunk.to(device)):
                return False
    return True


def _fill(network: nn.Module, rng: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            inputs = max(1, parameter[0].numel()) if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * (2 / inputs) ** 0.5)


def _all_the_same(engine: Engine, chunk: Chunk) -> bool:
    parts, last = engine.contributions(F.softplus, chunk)
    rows: list[Tensor] = []
    for part in parts:
        rows.append(part.squared_norms())
        rows += [part.values] if isinstance(part, Formed) else [part.outputs.flatten(1), part.inputs.flatten(1)]
    if not all(_equal_rows(values, values[:1]) for values in rows):
        return False
    first: tuple[Tensor, Tensor] | None = None
    for _, few in last.few() if last is not None else ():
        norms = few.squared_norms()
        first = first or (few.values[:1].clone(), norms[:1].clone())
        if not (_equal_rows(few.values, first[0]) and _equal_rows(norms, first[1])):
            return False
    return True


def _equal_rows(values: Tensor, row: Tensor) -> bool:
    return bool((values == row).all())
