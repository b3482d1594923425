"""The weights of a pair as named arrays: the form that travels, is averaged and is stored."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.config import Proposal, Transport
from common.errors import WireError
from common.messages import Arrays, Kind
from common.models import Pair

BOTH = ("generator", "discriminator")
LARGEST_FLOAT16 = 65504.0


def get_weights(pair: Pair) -> dict[str, npt.NDArray[Any]]:
    """Copy both networks' weights into arrays named "generator.…" and "discriminator.…"."""
    return {name: parameter.detach().numpy().copy() for name, parameter in named_parameters(pair)}


def set_weights(pair: Pair, arrays: Arrays, networks: Collection[str] = BOTH, transport: Transport = "float32") -> None:
    """Load named arrays into both networks, or into the named one; float16 is widened, which changes no value.

    Raises:
        WireError: The arrays are not exactly those of these networks, of the transport's dtype and finite.
    """
    check_arrays(arrays, weight_shapes(pair, networks), transport)
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


def for_transport(arrays: Arrays, transport: Transport) -> Arrays:
    """Round weights to the numbers that travel; float32 is left alone.

    float16 keeps 11 bits of a weight, eight times finer than bfloat16, which numpy does not have either. Its range is
    what it lacks: weights beyond are held at its largest number. A trained network's are far below; one that got there
    has diverged, and stays finite instead of ending the site's part in the run.

    Args:
        arrays: Weights in float32.
        transport: The proposal's.

    Guarantees:
        - repeatable: Rounding what is rounded already, and widened again, changes nothing.
        - saturates: A finite weight stays finite. What is not finite stays so, for the checks to find.
    """
    if transport == "float32":
        return arrays
    return {name: _to_float16(np.asarray(array)) for name, array in arrays.items()}


def release_dtype(proposal: Proposal, kind: Kind) -> str:
    """Return the dtype of a release: whole numbers with secure-sum, the transport's for a round's weights."""
    if proposal.train.algorithm == "secure-sum":
        return "int32"
    return proposal.federation.transport if kind is Kind.TRAIN else "float32"


def check_arrays(arrays: Arrays, expected: Mapping[str, tuple[int, ...]], dtype: str = "float32") -> None:
    """Refuse arrays that are not exactly the expected names and shapes, of one dtype and finite.

    Raises:
        WireError: A name is missing or extra, a shape or dtype differs, a value is not finite.
    """
    if arrays.keys() != expected.keys():
        missing, extra = expected.keys() - arrays.keys(), arrays.keys() - expected.keys()
        raise WireError(f"Expected {len(expected)} named arrays; {len(missing)} missing and {len(extra)} extra.")
    for name, shape in expected.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise WireError(f"Expected {name} as {dtype} {shape}, got {array.dtype} {array.shape}.")
        if not np.isfinite(array).all():
            raise WireError(f"Expected finite values in {name}; some are not.")


def named_parameters(pair: Pair, networks: Collection[str] = BOTH) -> list[tuple[str, nn.Parameter]]:
    """List the parameters of these networks with the names that their arrays have, in a fixed order."""
    modules = {"generator": pair.generator, "discriminator": pair.discriminator}
    return [(f"{name}.{key}", p) for name in BOTH if name in networks for key, p in modules[name].named_parameters()]


def _to_float16(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    held = np.clip(array, -LARGEST_FLOAT16, LARGEST_FLOAT16)
    return np.where(np.isfinite(array), held, array).astype(np.float16)
