"""What may leave the site, and the record of all that left.

Egress: a closed list per reply kind of array names, shapes and dtypes and a handful of scalars that depend only on
public values or on outputs that are already private. Everything else is refused at the door, by code. The journal is
what a privacy officer reads. Out of scope: what it cost (client/ledger).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, final

import numpy as np

from client.chain import Body, Chain
from client.policy import MAX_REPLY_BYTES
from common.config import Proposal
from common.crypto import SigningKey, VerifyKey
from common.errors import PolicyRefusal, RefusalCode, StorageError
from common.greeting import CAPABILITIES, FORMS
from common.messages import PACKAGE_VERSION, Kind, Reply, size_bytes
from common.seal import content_digest

if TYPE_CHECKING:  # `import` and `check` write no reply, and do without torch
    from common.models import Pair


NAME = "journal"

_BUDGET: Mapping[str, type] = {"epsilon_spent": float, "epsilon_allowed": float}
_FIELDS: Mapping[Kind, Mapping[str, type]] = {
    # from the policy, the release, the ledger and the list of imports (client/hello)
    Kind.HELLO: {
        **{"site": str, "declared_patients": int, "protocol": int, "package": str, "proposal_sha256": str},
        **{"capabilities": str, "verdict": str, "rounds_allowed": int},
    },
    Kind.WARMUP: _BUDGET,
    # the discriminator's accuracy on fakes sees no patient: post-processing of private weights
    Kind.TRAIN: {**_BUDGET, "fake_accuracy": float, "d_steps_per_g_step": int},
    Kind.GRADIENT: _BUDGET,
}
_TEXTS = {**FORMS, "package": re.escape(PACKAGE_VERSION), "capabilities": re.escape(CAPABILITIES)}
"""What may stand in a field that is a text, as a regular expression: no reply has any other text."""


@final
@dataclass(frozen=True)
class Release:
    """Exactly what one reply may carry.

    Attributes:
        arrays: Shape and dtype by name.
        fields: Type by name; what a text may be stands in `_TEXTS`.
    """

    arrays: Mapping[str, tuple[tuple[int, ...], str]]
    fields: Mapping[str, type]

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays together."""
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.arrays.values())


@final
@dataclass(frozen=True)
class Entry:
    """One release in the journal.

    Attributes:
        time: When it was released, ISO 8601.
        run_id: The run.
        round: The round.
        kind: What was asked.
        sha256: Digest of the content (`common.seal.content_digest`).
        size_bytes: Bytes of the arrays.
        epsilon_after: Epsilon of everything charged, this release with it.
    """

    time: str
    run_id: str
    round: int
    kind: Kind
    sha256: str
    size_bytes: int
    epsilon_after: float


def reply_shapes(proposal: Proposal, asked: "Pair | int") -> dict[str, tuple[int, ...]]:
    """Return the shapes of what leaves in one reply, from public values alone.

    Args:
        proposal: The shared sections of the configuration.
        asked: The networks of a round, or the length of a vector of the warm-up.
    """
    if isinstance(asked, int):
        return {"embedding": (len(proposal.image.classes), asked)}
    if proposal.train.algorithm == "secure-sum":
        return {"gradient": (sum(parameter.numel() for parameter in asked.discriminator.parameters()),)}
    from common.weights import weight_shapes

    return weight_shapes(asked)


def release_schema(kind: Kind, shapes: Mapping[str, tuple[int, ...]], dtype: str = "float32") -> Release:
    """Return what a reply of one kind may carry.

    Args:
        kind: The request's kind.
        shapes: Of the arrays by name: none for hello, else `reply_shapes`.
        dtype: Of all arrays (`common.weights.release_dtype`).
    """
    return Release({name: (tuple(shape), dtype) for name, shape in shapes.items()}, _FIELDS[kind])


def check_egress(reply: Reply, allowed: Release, max_reply_bytes: int = MAX_REPLY_BYTES) -> None:
    """Let a reply pass only if it carries exactly what is allowed; a refusal carries nothing but its code.

    Args:
        reply: What is about to leave.
        allowed: The closed list for it, made from public values and never from the reply.
        max_reply_bytes: The policy's bound on the bytes of the arrays.

    Raises:
        PolicyRefusal: Anything is missing, extra, of another dtype, shape or type, not finite, or too large.

    Guarantees:
        - closed_list: What is not on the list does not leave: loss or accuracy on patients, cohort or batch sizes,
          label counts, timing, exception text, file names, tags.
        - bounded: No reply carries more bytes of arrays than the policy allows.
    """
    if reply.refusal is not None:
        allowed = Release({}, {})
    _same_names("arrays", reply.arrays, allowed.arrays)
    _same_names("fields", reply.fields, allowed.fields)
    for name, (shape, dtype) in allowed.arrays.items():
        array = reply.arrays[name]
        if type(array) is not np.ndarray or array.dtype != np.dtype(dtype) or array.shape != shape:
            _refuse(f"array {name} is not {dtype} of shape {shape}")
        if not np.isfinite(array).all():
            _refuse(f"array {name} is not finite")
    if size_bytes(reply.arrays) > max_reply_bytes:
        _refuse(f"{size_bytes(reply.arrays)} bytes are more than max_reply_bytes={max_reply_bytes} of policy.toml")
    for name, expected in allowed.fields.items():
        value = reply.fields[name]
        if type(value) is not expected:
            _refuse(f"field {name} is not of type {expected.__name__}")
        if isinstance(value, float) and not np.isfinite(value):
            _refuse(f"field {name} is not finite")
        if isinstance(value, str) and re.fullmatch(_TEXTS[name], value) is None:
            _refuse(f"field {name} is not of its form")


def append(folder: Path, key: SigningKey, reply: Reply, epsilon_after: float, time: datetime) -> None:
    """Write a release to the journal, before it leaves; the same release again writes nothing.

    A refusal after a charge is its outcome and is written too; one before any charge is not handed to this function.

    Raises:
        PolicyRefusal: Something else was released for the same run, round and kind.
        StorageError: The disk does not take it, or the journal was changed.

    Guarantees:
        - once: One line for each release, however often it is sent.
        - one_release_per_charge: A warm-up or a round has one output; another one is refused.
    """
    entry = Entry(
        time.isoformat(timespec="seconds"),
        reply.run_id,
        reply.round,
        reply.kind,
        content_digest(reply),
        size_bytes(reply.arrays),
        epsilon_after,
    )
    chain = Chain(folder, NAME, key.verify_key, key)
    with chain.locked():
        standing = (body for body in chain.bodies if body.get("round") == entry.round)
        same = [old for old in map(_entry, standing) if (old.run_id, old.kind) == (entry.run_id, entry.kind)]
        if any(old.sha256 == entry.sha256 for old in same):
            return
        if same and entry.kind is not Kind.HELLO:
            raise PolicyRefusal(
                RefusalCode.REPLAYED,
                f"Round {entry.round} ({entry.kind}) of this run released something else before. "
                "Send the stored reply.",
            )
        chain.append(_body(entry))


def start(folder: Path, key: SigningKey) -> None:
    """Start an empty journal, so that a missing one is seen from then on; one that stands is verified and kept.

    Raises:
        StorageError: The disk does not take it, or the journal was changed.
    """
    Chain(folder, NAME, key.verify_key, key)


def entries(folder: Path, verify_key: VerifyKey) -> tuple[Entry, ...]:
    """Verify a journal without the private key and return its lines.

    Raises:
        StorageError: It cannot be read, or it was truncated, edited, reordered or signed by another key.
    """
    return tuple(_entry(body) for body in Chain(folder, NAME, verify_key).bodies)


def _same_names(what: str, given: Mapping[str, Any], allowed: Mapping[str, Any]) -> None:
    if set(given) != set(allowed):
        _refuse(f"{len(set(given) - set(allowed))} {what} too many and {len(set(allowed) - set(given))} missing")


def _refuse(what: str) -> NoReturn:
    raise PolicyRefusal(
        RefusalCode.INTERNAL,
        f"A reply was stopped at the door: {what}. Nothing left the site. This is a fault of the agent: report it.",
    )


def _body(entry: Entry) -> dict[str, Any]:
    return {
        "time": entry.time,
        "run_id": entry.run_id,
        "round": entry.round,
        "kind": entry.kind.value,
        "sha256": entry.sha256,
        "size_bytes": entry.size_bytes,
        "epsilon_after": entry.epsilon_after,
    }


def _entry(body: Body) -> Entry:
    try:
        return Entry(
            body["time"],
            body["run_id"],
            body["round"],
            Kind(body["kind"]),
            body["sha256"],
            body["size_bytes"],
            body["epsilon_after"],
        )
    except (KeyError, ValueError) as error:
        raise StorageError(
            "A line of the journal is of another version. Use the version of fedmedgan that wrote it."
        ) from error
