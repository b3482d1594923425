"""The clipped contributions of a whole batch, added up: chunk after chunk, on as many threads as there are engines.

A chunk's sum is computed by one thread alone, and chunks are added in their order: how many threads there are changes
nothing. Out of scope: noise and scale (step).
"""

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import final

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from client.dp.contributions import add_clipped
from client.dp.engine import Engine, Loss
from client.dp.fast import FastEngine
from client.dp.packing import Chunk
from client.dp.reference import ReferenceEngine
from common.config import GradientEngine

Group = tuple[list[Chunk], Loss]
"""Chunks that are clipped together, and their loss: several patients in one chunk, or one patient in several."""


@final
class Adder:
    """Engines on one discriminator, each with memory of its own, and a thread for each where there are several."""

    def __init__(self, discriminator: nn.Module, engine: GradientEngine, rows: int, max_grad_norm: float) -> None:
        """Make as many fast engines as torch has threads, or one reference engine.

        Raises:
            ConfigError: The fast engine does not know a layer; it is named.
        """
        self.discriminator, self._max_grad_norm = discriminator, max_grad_norm
        threads = torch.get_num_threads()
        if engine == "opacus":
            self._engines: list[Engine] = [ReferenceEngine(discriminator)]
        else:
            shared = {id(parameter): parameter for parameter in discriminator.parameters()}
            self._engines = [FastEngine(discriminator, rows)]
            self._engines += [FastEngine(copy.deepcopy(discriminator, dict(shared)), rows) for _ in range(threads - 1)]
        self._pool = _pool(threads) if self.threads > 1 else None

    @property
    def threads(self) -> int:
        """How many chunks are worked on at a time."""
        return len(self._engines)

    def clipped_sum(self, groups: Iterable[Group]) -> Float64[Tensor, " gradient"]:
        """Clip each patient's contribution and add all of them up, flat."""
        parameters = list(self.discriminator.parameters())
        numbers = sum(parameter.numel() for parameter in parameters)
        total = torch.zeros(numbers, dtype=torch.float64, device=parameters[0].device)
        for part in self._sums(groups, total):
            total += part
        return total

    def by_parameter(self, gradient: Tensor) -> list[Tensor]:
        """Cut the flat gradient into the shapes of the parameters, in their order."""
        return self._engines[0].by_parameter(gradient)

    def _sums(self, groups: Iterable[Group], like: Tensor) -> Iterator[Tensor]:
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

    def _sum(self, engine: Engine, group: Group, like: Tensor) -> Tensor:
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
