"""Requests and replies as Flower messages, decoded strictly. Out of scope: what they mean (common/messages).

One ArrayRecord ("arrays") and one ConfigRecord ("header") in a RecordDict. All arrays travel as one safetensors body,
as on the agent's socket: Flower asks twice for each array that stands alone, and those questions, not the bytes, were
what a round took. Everything is bounded and checked before it is used: protocol version, the exact set of keys, sizes,
dtypes, bytes left over, finite values.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from common.config import MAX_PROPOSAL_BYTES
from common.errors import RefusalCode, WireError
from common.messages import (
    MAX_DEADLINE,
    PACKAGE_VERSION,
    PROTOCOL_VERSION,
    VERSION_FORM,
    Arrays,
    Kind,
    Reply,
    Request,
    Scalar,
    Seal,
)

MAX_ARRAYS = 512
MAX_NAME_CHARACTERS = 128
MAX_TOTAL_BYTES = 1 << 29
MAX_SCALARS = 64
MAX_DIMENSIONS = 8
MAX_LISTING_BYTES = MAX_ARRAYS * (6 * MAX_NAME_CHARACTERS + 256)
"""Of the names and shapes before the arrays; a letter of a name may take six bytes there."""
MAX_TEXT_CHARACTERS = 256

MESSAGE_TYPES = {
    Kind.HELLO: "query.hello",
    Kind.WARMUP: "train.warmup",
    Kind.TRAIN: "train.round",
    Kind.GRADIENT: "train.gradient",
}
_DTYPES = (np.dtype("<f4"), np.dtype("<i4"), np.dtype("<f2"))
_BODY, _FORM = "body", "safetensors"

_REQUEST_KEYS = {"protocol", "kind", "run", "round", "proposal", "nonce", "deadline", "signature"}
_REPLY_KEYS = {"protocol", "package", "kind", "run", "round", "refusal", "signature"}
_SCALAR_PREFIX = "scalar."


@final
@dataclass(frozen=True)
class Release:
    """What the header of a message says of the release that wrote it, unsigned.

    Attributes:
        protocol: Its protocol version.
        package: Its package version; empty where the header does not say.
    """

    protocol: int
    package: str


def encode_requests(requests: Mapping[int, Request], ttl_s: float) -> list[Message]:
    """Make the messages of one request for each node, in their order; arrays that several share are written once."""
    bodies = {id(arrays): _body(arrays) for arrays in {id(r.arrays): r.arrays for r in requests.values()}.values()}
    return [_request(request, node_id, ttl_s, bodies[id(request.arrays)]) for node_id, request in requests.items()]


def encode_request(request: Request, node_id: int, ttl_s: float) -> Message:
    """Make the Flower message of a request, valid for `ttl_s` seconds."""
    return _request(request, node_id, ttl_s, _body(request.arrays))


def _request(request: Request, node_id: int, ttl_s: float, body: ArrayRecord) -> Message:
    header = _header(request.kind, request.run_id, request.round, request.settings)
    header["proposal"], seal = request.proposal, request.seal or Seal("", 0, "")
    header |= {"nonce": seal.nonce, "deadline": seal.deadline, "signature": seal.signature}
    return Message(
        RecordDict({"header": ConfigRecord(header), "arrays": body}),
        dst_node_id=node_id,
        message_type=MESSAGE_TYPES[request.kind],
        ttl=ttl_s,
        group_id=str(request.round),
    )


def decode_request(message: Message) -> Request:
    """Read a request strictly.

    Raises:
        WireError: The message is no request of this protocol version, or breaks a bound.

    """
    header, scalars, arrays = _read(message.content, _REQUEST_KEYS)
    proposal = _text(header, "proposal", MAX_PROPOSAL_BYTES)
    seal = Seal(_text(header, "nonce"), _whole(header, "deadline", MAX_DEADLINE), _text(header, "signature"))
    sealed = seal if seal.signature else None
    return Request(_kind(header), _text(header, "run"), _whole(header, "round"), proposal, scalars, arrays, sealed)


def encode_reply(reply: Reply, request: Message) -> Message:
    """Make the Flower message that answers `request`."""
    header = _header(reply.kind, reply.run_id, reply.round, reply.fields)
    header |= {"refusal": reply.refusal.value if reply.refusal else "", "signature": reply.signature}
    header["package"] = PACKAGE_VERSION
    return Message(RecordDict({"header": ConfigRecord(header), "arrays": _body(reply.arrays)}), reply_to=request)


def decode_reply(message: Message) -> Reply:
    """Read a reply strictly.

    Raises:
        WireError: The message is no reply of this protocol version, or breaks a bound.

    """
    header, scalars, arrays = _read(message.content, _REPLY_KEYS)
    code = _text(header, "refusal")
    if code and code not in set(RefusalCode):
        raise WireError(f"Expected a known refusal code, got {len(code)} characters that are none.")
    refusal = RefusalCode(code) if code else None
    run_id, round_, signature = _text(header, "run"), _whole(header, "round"), _text(header, "signature")
    _text(header, "package")
    return Reply(_kind(header), run_id, round_, refusal, scalars, arrays, signature)


def other_release(message: Message) -> Release | None:
    """Return of which release a message is if that speaks another protocol; None for any other message.

    The place of the two versions in a header is the one thing that no protocol version may change.
    """
    records = message.content if message.has_content() else RecordDict()
    header = records.get("header")
    if not isinstance(header, ConfigRecord):
        return None
    protocol, package = header.get("protocol"), header.get("package")
    if not isinstance(protocol, int) or isinstance(protocol, bool) or not 0 <= protocol < 2**31:
        return None
    known = isinstance(package, str) and re.fullmatch(VERSION_FORM, package[:64])
    return None if protocol == PROTOCOL_VERSION else Release(protocol, str(package) if known else "")


def array_bytes(message: Message) -> int:
    """Return the bytes of a message's arrays on the wire, without their listing and the message's own headers."""
    records = message.content.array_records.values() if message.has_content() else ()
    bodies = [array.data for record in records for array in record.values()]
    return sum(max(0, len(body) - 8 - int.from_bytes(body[:8], "little")) for body in bodies)


def _header(kind: Kind, run_id: str, round_: int, scalars: Mapping[str, Scalar]) -> dict[str, Any]:
    header: dict[str, Any] = {"protocol": PROTOCOL_VERSION, "kind": kind.value, "run": run_id, "round": round_}
    return header | {_SCALAR_PREFIX + name: value for name, value in scalars.items()}


def _body(arrays: Arrays) -> ArrayRecord:
    body = save_tensors({name: np.asarray(array, order="C") for name, array in arrays.items()})
    return ArrayRecord({_BODY: Array("uint8", (len(body),), _FORM, body)})


def _read(content: RecordDict, keys: set[str]) -> tuple[ConfigRecord, dict[str, Scalar], dict[str, npt.NDArray[Any]]]:
    if set(content.keys()) != {"header", "arrays"}:
        raise WireError(f"Expected the records header and arrays, got {len(content)} records.")
    header, record = content["header"], content["arrays"]
    if not isinstance(header, ConfigRecord) or not isinstance(record, ArrayRecord):
        raise WireError("Expected header as ConfigRecord and arrays as ArrayRecord.")
    if header.get("protocol") != PROTOCOL_VERSION:
        raise WireError(_other_protocol(header))
    names = {key for key in header if key.startswith(_SCALAR_PREFIX)}
    if set(header) - names != keys or len(names) > MAX_SCALARS:
        raise WireError(f"Expected the header keys {sorted(keys)} and at most {MAX_SCALARS} scalars.")
    return header, {name.removeprefix(_SCALAR_PREFIX): _scalar(header[name]) for name in names}, _arrays(record)


def _other_protocol(header: ConfigRecord) -> str:
    theirs = header.get("protocol")
    known = isinstance(theirs, int) and not isinstance(theirs, bool) and 0 <= theirs < 2**31
    return (
        f"Expected protocol version {PROTOCOL_VERSION}, which fedmedgan {PACKAGE_VERSION} of this side speaks, got "
        f"{theirs if known else 'none'}. Update the side with the lower one."
    )


def _arrays(record: ArrayRecord) -> dict[str, npt.NDArray[Any]]:
    """Read the body: its size and that of its listing are looked at before it is."""
    if set(record) != {_BODY} or record[_BODY].stype != _FORM:
        raise WireError(f"Expected all arrays in one {_FORM} body, got {len(record)} entries.")
    body = record[_BODY].data
    listing_bytes = int.from_bytes(body[:8], "little")
    if len(body) > MAX_TOTAL_BYTES + MAX_LISTING_BYTES or listing_bytes > MAX_LISTING_BYTES:
        raise WireError(
            f"Expected at most {MAX_TOTAL_BYTES} bytes of arrays and {MAX_LISTING_BYTES} of their listing, got "
            f"{len(body)} and {listing_bytes}."
        )
    try:
        arrays = load_tensors(body)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WireError(f"Expected a {_FORM} body with no bytes left over; it does not decode.") from error
    _check_forms(arrays)
    return arrays


def _check_forms(arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    if len(arrays) > MAX_ARRAYS:
        raise WireError(f"Expected at most {MAX_ARRAYS} arrays, got {len(arrays)}.")
    if any(len(name) > MAX_NAME_CHARACTERS for name in arrays):
        raise WireError(f"Expected array names of at most {MAX_NAME_CHARACTERS} characters.")
    if any(array.ndim > MAX_DIMENSIONS for array in arrays.values()):
        raise WireError(f"Expected at most {MAX_DIMENSIONS} dimensions.")
    if any(array.dtype not in _DTYPES for array in arrays.values()):
        raise WireError("Expected float32, float16 or int32 arrays.")


def _kind(header: ConfigRecord) -> Kind:
    value = _text(header, "kind")
    if value not in set(Kind):
        raise WireError("Expected a known kind of request.")
    return Kind(value)


def _text(header: ConfigRecord, key: str, longest: int = MAX_TEXT_CHARACTERS) -> str:
    value = header[key]
    if not isinstance(value, str) or len(value) > longest:
        raise WireError(f"Expected {key} as text of at most {longest} characters.")
    return value


def _whole(header: ConfigRecord, key: str, bound: int = 2**31) -> int:
    value = header[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < bound:
        raise WireError(f"Expected {key} as a whole number in [0, {bound}).")
    return value


def _scalar(value: object) -> Scalar:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise WireError("Expected scalars as whole numbers, floats or texts.")
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARACTERS:
        raise WireError(f"Expected texts of at most {MAX_TEXT_CHARACTERS} characters.")
    if isinstance(value, float) and not np.isfinite(value):
        raise WireError("Expected finite scalars.")
    return value
