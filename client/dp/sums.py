"""The clipped contributions of whole batches, added up: chunk after chunk, on as many threads as there are engines.

Out of scope: noise and scale (step).
"""

import copy
import functools
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import final

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from client.dp.contributions import add_clipped
from client.dp.engine import Engine, Loss
from client.dp.fast import FastEngine
from client.dp.layers import check_layers
from client.dp.packing import Batch, Chunk, pack
from client.dp.places import same_at_every_place
from common.config import GradientEngine

_Group = tuple[list[Chunk], Loss]
"""Chunks that are clipped together, and their loss: several patients in one chunk, or one patient in several."""

_FORMED_BYTES = 1 << 26

_rows_found: dict[tuple[str, ...], int] = {}
"""What was tried on this machine, by everything that it may depend on."""


@final
class Adder:
    """Engines on one discriminator, each with memory of its own, and a thread for each where there are several.

    Guarantees:
        - company_changes_nothing: Chunks have so many rows that a patient's contribution has the same bits at every
          place; where no number of rows does it, one image passes at a time.
        - threads_change_nothing: A chunk is computed by one thread alone, and chunks are added in their order.
    """

    def __init__(
        self, discriminator: nn.Module, engine: GradientEngine, rows: int, max_grad_norm: float, bf16: bool = False
    ) -> None:
        """Take a discriminator; engines are made when the size of the images is known.

        Args:
            discriminator: Whose gradients are taken.
            engine: By name.
            rows: Most images in a chunk, a power of two.
            max_grad_norm: Bound on each patient's contribution.
            bf16: Let the fast engine's activations have eight bits.

        Raises:
            ConfigError: The fast engine does not know a layer; it is named.
        """
        if engine == "fast":
            check_layers(discriminator)
        self.discriminator, self._device = discriminator, next(discriminator.parameters()).device
        self.threads = torch.get_num_threads() if engine == "fast" and self._device.type == "cpu" else 1
        self.rows = rows
        self._name, self._max_grad_norm, self._bf16 = engine, max_grad_norm, bf16
        self._engines: list[Engine] = []
        self._pool = _pool(self.threads) if self.threads > 1 else None

    def prepare(self, shape: Sequence[int]) -> None:
        """Find how many rows a chunk may have for images of this shape, and make the engines; the second time is free.

        Args:
            shape: Of an image: channels, then its sides in pixels.
        """
        if self._engines:
            return
        tried = (self.discriminator, self._name, self.rows, tuple(shape), self.threads, self._device, self._bf16)
        key = tuple(map(str, tried))
        if key not in _rows_found:
            _rows_found[key] = self._find_rows(shape)
        self.rows = _rows_found[key]
        own = itertools.chain(self.discriminator.parameters(), self.discriminator.buffers())
        shared = {id(tensor): tensor for tensor in own}
        others = [copy.deepcopy(self.discriminator, dict(shared)) for _ in range(self.threads - 1)]
        self._engines = [self._engine(network, self.rows) for network in (self.discriminator, *others)]

    def clipped_sum(self, batches: Iterable[tuple[Batch, Loss]]) -> Float64[Tensor, " gradient"]:
        """Clip each patient's contribution and add all of them up, flat; after `prepare`."""
        parameters = list(self.discriminator.parameters())
        numbers = sum(parameter.numel() for parameter in parameters)
        total = torch.zeros(numbers, dtype=torch.float64, device=self._device)
        packed = ((chunks, loss) for batch, loss in batches for chunks in pack(batch, self.rows))
        groups = (([chunk.to(self._device) for chunk in chunks], loss) for chunks, loss in packed)
        for part in self._sums(groups, total):
            total += part
        return total

    def by_parameter(self, gradient: Tensor) -> list[Tensor]:
        """Cut the flat gradient into the shapes of the parameters, in their order."""
        return self._engines[0].by_parameter(gradient)

    def _find_rows(self, shape: Sequence[int]) -> int:
        numbers = sum(parameter.numel() for parameter in self.discriminator.parameters())
        rows = self.rows
        while rows > 1 and (rows * numbers * 4 > _FORMED_BYTES or not self._agrees(rows, shape)):
            rows //= 2
        return rows

    def _agrees(self, rows: int, shape: Sequence[int]) -> bool:
        arguments = (functools.partial(self._engine, rows=rows), self.discriminator, rows, shape)
        if self._pool is None:
            return same_at_every_place(*arguments)
        return self._pool.submit(same_at_every_place, *arguments).result()  # on a thread as in the real step

    def _engine(self, network: nn.Module, rows: int) -> Engine:
        if self._name == "fast":
            return FastEngine(network, rows, self._bf16)
        from client.dp.reference import ReferenceEngine  # Opacus takes a second to import

        return ReferenceEngine(network)

    def _sums(self, groups: Iterable[_Group], like: Tensor) -> Iterator[Tensor]:
        if self._pool is None:
            yield from (self._sum(self._engines[0], group, like) for group in groups)
            return
        running: deque[Future[Tensor]] = deque()
        for number, group in enumerate(groups):
            if len(running) == self.threads:  # the engine of this turn is free again after this
                yield running.popleft().result()
            engine = self._engines[number % self.threads]
            running.append(self._pool.submit(self._sum, engine, group, like))
        while running:
            yield running.popleft().result()

    def _sum(self, engine: Engine, group: _Group, like: Tensor) -> Tensor:
        chunks, loss = group
        total = torch.zeros_like(like)
        if len(chunks) == 1:
            add_clipped(total, *engine.contributions(loss, chunks[0]), self._max_grad_norm)
            return total
        one = torch.ones(1, dtype=total.dtype, device=total.device)
        for chunk in chunks:
            parts, last = engine.contributions(loss, chunk)
            for part in [*parts, *(formed for _, formed in (last.few() if last else []))]:
                part.add_clipped(total, one)
        norm = total.norm()
        return torch.where(norm < math.inf, total * (self._max_grad_norm / norm.clamp(min=self._max_grad_norm)), 0.0)


def _pool(threads: int) -> ThreadPoolExecutor:
    """Start threads each of which computes alone; they end when the pool is forgotten."""
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    started = Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(threads)  # for threads that others start later, torch kept what was set last
    return pool
