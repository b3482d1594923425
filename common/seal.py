"""Who asks and who answers: requests signed by the coordinator, replies signed by the site, each for one question.

Flower proves a node by a signed time stamp alone, so a site could answer in another's name, and whoever holds the link
could ask in the coordinator's. A sealed request has a nonce that no other request has and a moment after which no site
acts on it; a reply is signed over that nonce, the question and all that it carries. Out of scope: keys and who pins
them (client/joining, server/consortium), encoding (common/wire, client/channel).
"""

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from common.crypto import SigningKey, VerifyKey
from common.errors import PolicyRefusal, RefusalCode, WireError
from common.messages import Arrays, Kind, Reply, Request, Seal

NONCE_BYTES = 16
_REQUEST, _REPLY = "request", "reply"


@final
@dataclass(frozen=True)
class Trust:
    """Whom a coordinator is and whom it believes.

    Attributes:
        key: The coordinator's own.
        sites: Identity key of every enrolled site by name.
    """

    key: SigningKey
    sites: Mapping[str, VerifyKey]


def seal_request(key: SigningKey, request: Request, deadline_s: float, site: VerifyKey | None = None) -> Request:
    """Sign a request for one site, with a nonce of its own, valid until `deadline_s` (seconds since 1970).

    Args:
        key: The coordinator's.
        request: What is asked.
        deadline_s: Seconds since 1970.
        site: Identity of the site that shall act on it; None for a hello alone, by which the coordinator learns who is
            behind a node.
    """
    nonce, deadline = secrets.token_hex(NONCE_BYTES), math.ceil(deadline_s)
    signature = key.sign(_asked(request, nonce, deadline, site), _REQUEST)
    return replace(request, seal=Seal(nonce, deadline, signature.hex()))


def check_request(key: VerifyKey, request: Request, now: float, site: VerifyKey) -> None:
    """Let a request pass only if the pinned coordinator signed it and it is not too late.

    Args:
        key: The coordinator's, pinned when the site joined.
        request: As it arrived.
        now: Seconds since 1970.
        site: Identity of the site that is asked.

    Raises:
        WireError: It is not sealed, or by somebody else, or for another site, or was changed.
        PolicyRefusal: Its deadline is over.

    Guarantees:
        - whole_request: Kind, run, round, proposal, settings, arrays, nonce and deadline are all under the signature.
        - one_site: What was signed for one site does not pass at another; a hello, which costs nothing, is for any.
        - stale_requests_cost_nothing: After the deadline a request is refused before anything is done for it.
    """
    seal = request.seal
    if seal is None:
        raise WireError("Expected a request that the coordinator signed, got one without a signature.")
    key.verify(_asked(request, seal.nonce, seal.deadline, site), _bytes(seal.signature), _REQUEST)
    require_in_time(request, now)


def require_in_time(request: Request, now: float) -> None:
    """Refuse a request whose deadline is over; one without a seal has none.

    Raises:
        PolicyRefusal: It is.
    """
    seal = request.seal
    if seal is not None and now > seal.deadline:
        raise PolicyRefusal(
            RefusalCode.EXPIRED,
            f"The deadline of round {request.round} is over by {now - seal.deadline:.0f} s. If this happens often, "
            "compare the clocks of both machines, or raise federation.round_timeout_s.",
        )


def sign_reply(key: SigningKey, request: Request, reply: Reply) -> Reply:
    """Sign a reply as the answer to this very request; one to a request without a seal stays unsigned."""
    if request.seal is None:
        return reply
    return replace(reply, signature=key.sign(_answered(request, reply), _REPLY).hex())


def check_reply(key: VerifyKey, request: Request, reply: Reply) -> None:
    """Let a reply pass only if the site signed it as the answer to this very request.

    Raises:
        WireError: It is not signed, by another site, for another question, or was changed.

    Guarantees:
        - one_question: A reply to another round, run, site or nonce does not pass, however often it is sent.
    """
    key.verify(_answered(request, reply), _bytes(reply.signature), _REPLY)


def request_digest(request: Request) -> str:
    """Return the SHA-256 of all that a request asks, its run and seal aside, in hexadecimal."""
    parts = [request.kind.value, str(request.round), request.proposal]
    parts += [json.dumps(dict(request.settings), sort_keys=True)]
    sha = hashlib.sha256("\0".join(parts).encode())
    for name in sorted(request.arrays):
        array = np.ascontiguousarray(request.arrays[name])
        sha.update(f"\0{name}\0{array.dtype}\0{array.shape}\0".encode() + array.tobytes())
    return sha.hexdigest()


def content_digest(reply: Reply) -> str:
    """Return the SHA-256 of all that a reply carries, in hexadecimal.

    Over the refusal, the fields and the sorted names, dtypes and shapes of the arrays as canonical JSON, then the bytes
    of the arrays in that order.
    """
    arrays: Arrays = {name: np.ascontiguousarray(reply.arrays[name]) for name in sorted(reply.arrays)}
    listing = [[name, array.dtype.str, list(reply.arrays[name].shape)] for name, array in arrays.items()]
    head = {"refusal": reply.refusal, "fields": dict(reply.fields), "arrays": listing}
    text = json.dumps(head, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    digest = hashlib.sha256(len(text).to_bytes(8, "big") + text)
    for array in arrays.values():
        digest.update(array.tobytes())
    return digest.hexdigest()


def _asked(request: Request, nonce: str, deadline: int, site: VerifyKey | None) -> bytes:
    head = [request.run_id, nonce, deadline, request_digest(request)]
    if request.kind is not Kind.HELLO:  # whose form stays, so that releases of other protocols can be told apart
        head.append("" if site is None else site.to_bytes().hex())
    return json.dumps(head).encode()


def _answered(request: Request, reply: Reply) -> bytes:
    nonce = "" if request.seal is None else request.seal.nonce
    head = [request.run_id, nonce, request_digest(request), reply.kind.value, reply.run_id, reply.round]
    return json.dumps([*head, content_digest(reply)]).encode()


def _bytes(signature: str) -> bytes:
    try:
        return bytes.fromhex(signature)
    except ValueError as error:
        raise WireError("Expected a signature in hexadecimal.") from error
