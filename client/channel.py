"""The Unix socket between relay and agent: a length-prefixed JSON header and a safetensors body.

The same form stores replies on disk. No pickle, no torch. Out of scope: what a request means (client/agent).
"""

import json
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from common.errors import RefusalCode, WireError
from common.messages import MAX_DEADLINE, Kind, Reply, Request, Seal

MAGIC = b"FMGC\x02\x00\x00\x00"
MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = (1 << 29) + (1 << 20)
"""The weights of the largest model that there may be (common/models) and their listing."""
MAX_LISTING_BYTES = 1 << 19
"""Names and shapes of the arrays of a body: a million tiny ones cost nothing but this look."""
_PREFIX = struct.Struct("<8sIQ")

Transport = Callable[[Request], Reply]


def pack_request(request: Request) -> bytes:
    """Write a request as one frame."""
    seal = None if request.seal is None else [request.seal.nonce, request.seal.deadline, request.seal.signature]
    header = {"proposal": request.proposal, "settings": dict(request.settings), "seal": seal}
    return _pack(request.kind, request.run_id, request.round, header, request.arrays)


def unpack_request(frame: bytes) -> Request:
    """Read a request frame strictly.

    Raises:
        WireError: The frame does not decode, or bytes are left over.

    """
    header, arrays = _unpack(frame, {"kind", "run", "round", "proposal", "settings", "seal"})
    run_id, round_, seal = str(header["run"]), int(header["round"]), _seal(header["seal"])
    return Request(_kind(header), run_id, round_, str(header["proposal"]), header["settings"], arrays, seal)


def pack_reply(reply: Reply) -> bytes:
    """Write a reply as one frame."""
    header: dict[str, Any] = {"refusal": reply.refusal.value if reply.refusal else None, "fields": dict(reply.fields)}
    header["signature"] = reply.signature
    return _pack(reply.kind, reply.run_id, reply.round, header, reply.arrays)


def unpack_reply(frame: bytes) -> Reply:
    """Read a reply frame strictly.

    Raises:
        WireError: The frame does not decode, or bytes are left over.

    """
    header, arrays = _unpack(frame, {"kind", "run", "round", "refusal", "fields", "signature"})
    code = header["refusal"]
    if code is not None and not (isinstance(code, str) and code in set(RefusalCode)):
        raise WireError("Expected a known refusal code.")
    refusal = RefusalCode(code) if code is not None else None
    signature = header["signature"]
    return Reply(_kind(header), str(header["run"]), int(header["round"]), refusal, header["fields"], arrays, signature)


def connect(path: Path, timeout_s: float) -> Transport:
    """Return a transport that asks the agent behind the socket at `path`, one connection a request.

    The transport raises OSError when the agent is not there, ends before it answers or has not answered after
    `timeout_s`; WireError when its answer does not decode.
    """

    def ask(request: Request) -> Reply:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(pack_request(request))
            frame = read_frame(connection, timeout_s)
            if not frame:
                raise ConnectionResetError("The agent ended before it answered.")
            return unpack_reply(frame)

    return ask


def read_frame(connection: socket.socket, within_s: float) -> bytes:
    """Read one frame, its sizes checked before a byte of it is allocated.

    Args:
        connection: An open socket; its own time-out is changed.
        within_s: For the whole frame, however small the pieces that it comes in, seconds.

    Returns:
        The frame; nothing where the peer closed without a byte.

    Raises:
        WireError: The prefix is not ours, a size is over its bound, or the peer stopped early.
        TimeoutError: The frame is not here after `within_s`.

    """
    deadline = time.monotonic() + within_s
    try:
        first = _receive(connection, _PREFIX.size, deadline)
        if not first:
            return b""
        prefix = first + _read_exactly(connection, _PREFIX.size - len(first), deadline)
        magic, header_bytes, body_bytes = _PREFIX.unpack(prefix)
        _check_prefix(magic, header_bytes, body_bytes)
        return prefix + _read_exactly(connection, header_bytes + body_bytes, deadline)
    except TimeoutError:
        raise TimeoutError(f"Expected a whole frame in {within_s:g} s.") from None


def _pack(kind: Kind, run_id: str, round_: int, header: dict[str, Any], arrays: Any) -> bytes:
    text = json.dumps(header | {"kind": kind.value, "run": run_id, "round": round_}).encode()
    body = save_tensors({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return _PREFIX.pack(MAGIC, len(text), len(body)) + text + body


def _unpack(frame: bytes, keys: set[str]) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    if len(frame) < _PREFIX.size:
        raise WireError(f"Expected a frame of at least {_PREFIX.size} bytes, got {len(frame)}.")
    magic, header_bytes, body_bytes = _PREFIX.unpack_from(frame)
    _check_prefix(magic, header_bytes, body_bytes)
    if len(frame) != _PREFIX.size + header_bytes + body_bytes:
        raise WireError(f"Expected a frame of {_PREFIX.size + header_bytes + body_bytes} bytes, got {len(frame)}.")
    text, body = frame[_PREFIX.size : _PREFIX.size + header_bytes], frame[_PREFIX.size + header_bytes :]
    if int.from_bytes(body[:8], "little") > MAX_LISTING_BYTES:
        raise WireError(f"Expected a listing of arrays of at most {MAX_LISTING_BYTES} bytes.")
    try:
        header = json.loads(text)
        json.dumps(header, ensure_ascii=False).encode()  # half a character: nothing could sign it
        arrays = load_tensors(body)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, RecursionError) as error:
        raise WireError("Expected a JSON header and a safetensors body; one does not decode.") from error
    if not isinstance(header, dict) or set(cast("dict[str, Any]", header)) != keys:
        raise WireError(f"Expected the header keys {sorted(keys)}.")
    for part in ("settings", "fields"):
        if part in keys and not isinstance(header[part], dict):
            raise WireError(f"Expected {part} as a table of scalars.")
    if type(header["round"]) is not int or not all(
        isinstance(header[k], str) for k in keys & {"run", "proposal", "signature"}
    ):
        raise WireError("Expected round as a whole number, run, proposal and signature as texts.")
    return cast("dict[str, Any]", header), arrays


def _check_prefix(magic: bytes, header_bytes: int, body_bytes: int) -> None:
    if magic != MAGIC:
        raise WireError("Expected a frame of this release. Install the same release on both sides of the socket.")
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise WireError(
            f"Expected a header of at most {MAX_HEADER_BYTES} and a body of at most {MAX_BODY_BYTES} bytes, "
            f"got {header_bytes} and {body_bytes}."
        )


def _read_exactly(connection: socket.socket, size_bytes: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    while size_bytes > 0:
        part = _receive(connection, min(size_bytes, 1 << 20), deadline)
        if not part:
            raise WireError(f"Expected {size_bytes} more bytes on the socket; the peer closed it.")
        parts.append(part)
        size_bytes -= len(part)
    return b"".join(parts)


def _receive(connection: socket.socket, size_bytes: int, deadline: float) -> bytes:
    """Wait for some bytes until the deadline of them all: a time-out of each would never end with a peer that drips."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    connection.settimeout(left_s)
    return connection.recv(size_bytes)


def _seal(value: object) -> Seal | None:
    if value is None:
        return None
    match value:
        case [str(nonce), int(deadline), str(signature)] if type(deadline) is int and 0 <= deadline < MAX_DEADLINE:
            return Seal(nonce, deadline, signature)
        case _:
            raise WireError(f"Expected a seal of nonce, deadline in [0, {MAX_DEADLINE}) and signature, or none.")


def _kind(header: dict[str, Any]) -> Kind:
    if not isinstance(header["kind"], str) or header["kind"] not in set(Kind):
        raise WireError("Expected a known kind of request.")
    return Kind(header["kind"])
