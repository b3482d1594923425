"""The reference engine: Opacus' per-sample gradients, added up by patient. Slow, and somebody else's code."""

import warnings
from typing import final

import torch
from jaxtyping import Float
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import Tensor, nn

from client.dp.contributions import Contribution, Formed, Unformed
from client.dp.engine import Engine, Loss
from client.dp.packing import Chunk

# Opacus' hooks sit on the first layer too, whose input, an image, needs no gradient; torch says so at every step.
warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)


@final
class ReferenceEngine(Engine):
    """Gradients by Opacus' hooks, which are attached for one call at a time."""

    def __init__(self, discriminator: nn.Module) -> None:
        self._discriminator = discriminator

    def contributions(self, loss: Loss, chunk: Chunk) -> tuple[list[Contribution], Unformed | None]:
        """Return one contribution for each parameter, in their order; arguments as in `Engine`."""
        hooks = GradSampleHooks(self._discriminator, loss_reduction="sum")
        layers = [layer for layer in self._discriminator.modules() if isinstance(layer, nn.Conv2d)]
        handles = [layer.register_forward_pre_hook(_channels_first) for layer in layers]
        torch.dot(chunk.weights, loss(self._discriminator(chunk.images, chunk.labels))).backward()
        parts: list[Contribution] = []
        start = 0
        for parameter in self._discriminator.parameters():
            samples: Tensor = getattr(parameter, "grad_sample")  # noqa: B009  # Opacus' own attribute
            parts.append(Formed(samples.reshape(len(chunk.images) // chunk.slots, chunk.slots, -1).sum(1), start))
            start += parameter.numel()
            parameter.grad = None
            del parameter.grad_sample  # type: ignore[attr-defined]
        hooks.remove_hooks()
        for handle in handles:
            handle.remove()
        return parts, None

    def by_parameter(self, gradient: Float[Tensor, " gradient"]) -> list[Tensor]:
        """Cut the flat gradient into the shapes of the parameters, in their order."""
        parameters = list(self._discriminator.parameters())
        parts = gradient.split([parameter.numel() for parameter in parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


def _channels_first(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Lay an input out with its channels first: Opacus cuts patches of another layout wrongly, and says nothing."""
    return (arguments[0].contiguous(), *arguments[1:])
