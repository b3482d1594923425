"""Requests and replies as Flower messages, decoded strictly. Out of scope: what they mean (common/messages).

One ArrayRecord ("arrays") and one ConfigRecord ("header") in a RecordDict. Everything is bounded and checked before
an array is allocated: protocol version, the exact set of keys, sizes, dtypes, bytes left over, finite values.
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.lib import format as npy

from common.config import MAX_PROPOSAL_BYTES
from common.errors import RefusalCode, WireError
from common.messages import (
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
MAX_TOTAL_BYTES = 1 << 30
MAX_SCALARS = 64
MAX_DIMENSIONS = 8
MAX_TEXT_CHARACTERS = 256

MESSAGE_TYPES = {
    Kind.HELLO: "query.hello",
    Kind.WARMUP: "train.warmup",
    Kind.TRAIN: "train.round",
    Kind.GRADIENT: "train.gradient",
}
_DTYPES = ("<f4", "<i4", "<f2")

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


def encode_request(request: Request, node_id: int, ttl_s: float) -> Message:
    """Make the Flower message of a request, valid for `ttl_s` seconds."""
    header = _header(request.kind, request.run_id, request.round, request.settings)
    header["proposal"], seal = request.proposal, request.seal or Seal("", 0, "")
    header |= {"nonce": seal.nonce, "deadline": seal.deadline, "signature": seal.signature}
    return Message(
        _content(header, request.arrays),
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
    seal = Seal(_text(header, "nonce"), _whole(header, "deadline", 2**53), _text(header, "signature"))
    sealed = seal if seal.signature else None
    return Request(_kind(header), _text(header, "run"), _whole(header, "round"), proposal, scalars, arrays, sealed)


def encode_reply(reply: Reply, request: Message) -> Message:
    """Make the Flower message that answers `request`."""
    header = _header(reply.kind, reply.run_id, reply.round, reply.fields)
    header |= {"refusal": reply.refusal.value if reply.refusal else "", "signature": reply.signature}
    header["package"] = PACKAGE_VERSION
    return Message(_content(header, reply.arrays), reply_to=request)


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
    """Return the bytes of a message's arrays on the wire, without their headers and the message's own."""
    records = message.content.array_records.values() if message.has_content() else ()
    return sum(max(0, len(array.data) - _header_bytes(array.data)) for record in records for array in record.values())


def _header_bytes(data: bytes) -> int:
    return 10 + int.from_bytes(data[8:10], "little")  # npy format version 1.0


def _header(kind: Kind, run_id: str, round_: int, scalars: Mapping[str, Scalar]) -> dict[str, Any]:
    header: dict[str, Any] = {"protocol": PROTOCOL_VERSION, "kind": kind.value, "run": run_id, "round": round_}
    return header | {_SCALAR_PREFIX + name: value for name, value in scalars.items()}


def _content(header: Mapping[str, Any], arrays: Arrays) -> RecordDict:
    record = ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})
    return RecordDict({"header": ConfigRecord(dict(header)), "arrays": record})


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
    total_bytes = sum(len(array.data) for array in record.values())
    if len(record) > MAX_ARRAYS or total_bytes > MAX_TOTAL_BYTES:
        raise WireError(
            f"Expected at most {MAX_ARRAYS} arrays and {MAX_TOTAL_BYTES} bytes, got {len(record)} and {total_bytes}."
        )
    if any(len(name) > MAX_NAME_CHARACTERS for name in record):
        raise WireError(f"Expected array names of at most {MAX_NAME_CHARACTERS} characters.")
    return {name: _array(array) for name, array in record.items()}


def _array(array: Array) -> npt.NDArray[Any]:
    shape = tuple(array.shape)
    if len(shape) > MAX_DIMENSIONS or any(not 0 <= side <= MAX_TOTAL_BYTES for side in shape):
        raise WireError(f"Expected at most {MAX_DIMENSIONS} dimensions of whole sides that are not negative.")
    headers = {dtype: _npy_header(dtype, shape) for dtype in _DTYPES}
    for dtype, header in headers.items():
        if array.data.startswith(header):  # compared, not parsed: nothing of a message is evaluated
            body = array.data[len(header) :]
            if len(body) != math.prod(shape) * np.dtype(dtype).itemsize:
                raise WireError(f"Expected the bytes of shape {shape} and none left over, got {len(body)} bytes.")
            return np.frombuffer(body, dtype=dtype).reshape(shape)
    raise WireError(
        "Expected float32, float16 or int32 arrays in C order with the declared shape, in npy format version 1.0."
    )


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue()


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
