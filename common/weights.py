"""The weights of a pair as named arrays: the form that travels, is averaged and is stored."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.errors import WireError
from common.messages import Arrays
from common.models import Pair

BOTH = ("generator", "discriminator")


def get_weights(pair: Pair) -> dict[str, npt.NDArray[Any]]:
    """Copy both networks' weights into arrays named "generator.…" and "discriminator.…"."""
    return {name: parameter.detach().numpy().copy() for name, parameter in named_parameters(pair)}


def set_weights(pair: Pair, arrays: Arrays, networks: Collection[str] = BOTH) -> None:
    """Load named arrays into both networks, or into the named one.

    Raises:
        WireError: The arrays are not exactly those of these networks, float32 and finite.
    """
    check_arrays(arrays, weight_shapes(pair, networks))
    with torch.no_grad():
        for name, parameter in named_parameters(pair, networks):
            parameter.copy_(torch.from_numpy(np.array(arrays[name])))


def weight_shapes(pair: Pair, networks: Collection[str] = BOTH) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of these networks by name."""
    return {name: tuple(parameter.shape) for name, parameter in named_parameters(pair, networks)}


def only(arrays: Arrays, network: str) -> dict[str, npt.NDArray[Any]]:
    """Pick one network's arrays ("generator" or "discriminator"), names without the prefix."""
    prefix = f"{network}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def check_arrays(arrays: Arrays, expected: Mapping[str, tuple[int, ...]], dtype: type = np.float32) -> None:
    """Refuse arrays that are not exactly the expected names and shapes, of one dtype and finite.

    Raises:
        WireError: A name is missing or extra, a shape or dtype differs, a value is not finite.
    """
    if arrays.keys() != expected.keys():
        missing, extra = expected.keys() - arrays.keys(), arrays.keys() - expected.keys()
        raise WireError(f"Expected {len(expected)} named arrays; {len(missing)} missing and {len(extra)} extra.")
    for name, shape in expected.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != dtype:
            raise WireError(f"Expected {name} as {dtype.__name__} {shape}, got {array.dtype} {array.shape}.")
        if not np.isfinite(array).all():
            raise WireError(f"Expected finite values in {name}; some are not.")


def named_parameters(pair: Pair, networks: Collection[str] = BOTH) -> list[tuple[str, nn.Parameter]]:
    """List the parameters of these networks with the names that their arrays have, in a fixed order."""
    modules = {"generator": pair.generator, "discriminator": pair.discriminator}
    return [(f"{name}.{key}", p) for name in BOTH if name in networks for key, p in modules[name].named_parameters()]
