"""What coordinator and site say to each other, free of any transport. Out of scope: encoding (common/wire)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import version
from typing import Any, final

import numpy as np
import numpy.typing as npt

from common.errors import RefusalCode

PROTOCOL_VERSION = 4
"""Raised whenever two releases could no longer do a run together: see common/greeting."""

PACKAGE_VERSION = version("fedmedgan")
VERSION_FORM = r"[0-9A-Za-z][0-9A-Za-z.+!-]{0,31}"
"""The form of a package version, as a regular expression."""

MAX_DEADLINE = 2**53
"""Seconds since 1970 below which a deadline stands: a float holds each of them."""
Scalar = int | float | str
Arrays = Mapping[str, npt.NDArray[Any]]


class Kind(StrEnum):
    """The closed list of requests that a site answers."""

    HELLO = "hello"
    WARMUP = "warmup"
    TRAIN = "train"
    GRADIENT = "gradient"


@final
@dataclass(frozen=True)
class Seal:
    """The coordinator's signature under a request (common/seal).

    Attributes:
        nonce: Of this request to this site alone, in hexadecimal.
        deadline: Seconds since 1970 after which no site acts on it; in [0, `MAX_DEADLINE`) on the wire and the socket.
        signature: Over everything else, in hexadecimal.
    """

    nonce: str
    deadline: int
    signature: str


@final
@dataclass(frozen=True)
class Request:
    """One request of the coordinator to one site.

    Attributes:
        kind: What is asked.
        run_id: The run, chosen once by the coordinator.
        round: 0 for hello, 0... for releases of the warm-up, then training rounds or gradients.
        proposal: The coordinator's proposal as JSON (`Config.proposal`); the site's policy disposes.
        settings: What may change from round to round: `d_steps_per_g_step` for training, `look` for a warm-up; with
            secure-sum also `cohort_sites` and `cohort_patients`, of all sites together. For hello `package`, the
            coordinator's release.
        arrays: Weights by name ("generator.…", "discriminator.…"), for a gradient the discriminator's only; empty for
            hello, and for a warm-up but for a lens.
        seal: The coordinator's signature; None within one machine, where nobody stands between.
    """

    kind: Kind
    run_id: str
    round: int
    proposal: str
    settings: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])
    arrays: Arrays = field(default_factory=dict[str, npt.NDArray[Any]])
    seal: Seal | None = None


@final
@dataclass(frozen=True)
class Reply:
    """A site's answer: released fields and arrays, or a refusal code and nothing else.

    Attributes:
        kind: The request's kind.
        run_id: The request's run.
        round: The request's round.
        refusal: None when the site did what was asked.
        fields: Public scalars by name; the egress schema lists them (client/journal).
        arrays: Released arrays by name.
        signature: Of the site, in hexadecimal, if the request was sealed; else empty.
    """

    kind: Kind
    run_id: str
    round: int
    refusal: RefusalCode | None = None
    fields: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])
    arrays: Arrays = field(default_factory=dict[str, npt.NDArray[Any]])
    signature: str = ""


def size_bytes(arrays: Arrays) -> int:
    """Return the bytes of all arrays together, headers not counted."""
    return sum(np.asarray(array).nbytes for array in arrays.values())
