"""What is fuzzed: every door by which bytes of a coordinator reach code of a site. The first byte picks the door.

A decoder may raise WireError and nothing else; `answer` may raise nothing. A reply is packed and read back, and a
refusal carries nothing. The site is real; its budget is spent but for a crumb, so that nothing is trained for long.
"""

import atexit
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.agent import Site, answer, open_site
from client.channel import MAGIC, pack_reply, unpack_reply, unpack_request
from client.ledger import ChargeRequest
from common import wire
from common.errors import FedmedganError, WireError
from common.messages import Kind, Request
from common.privacy import Charge, noise_for
from tests.tiny_site import POLICY, make_home, train_request

TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # Flower makes no message without
HONEST = train_request()


@cache
def site() -> Site:
    """Make the site that is asked: a real home whose budget is all but spent."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-site-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = open_site(make_home(folder))
    most = Charge(noise_for(0.999 * POLICY.max_epsilon, POLICY.delta, 1.0, 1), 1.0, 1)
    made.ledger.charge(ChargeRequest("spent", 0, Kind.WARMUP, "00"), most, POLICY.max_epsilon, POLICY.delta)
    return made


def ask(request: Request) -> None:
    """Put a request to the site and hold the reply to its promises."""
    logging.getLogger("fedmedgan").setLevel(logging.CRITICAL)
    charges, reply = len(site().ledger.entries), answer(site(), request)
    frame = pack_reply(reply)
    if len(reply.run_id) < 1000:  # a longer one may come back escaped, over the bound of a header
        again = unpack_reply(frame)
        assert (again.kind, again.run_id, again.round, again.refusal) == (
            *(reply.kind, reply.run_id, reply.round, reply.refusal),
        )
    if reply.refusal is not None:
        assert dict(reply.fields) == {}
        assert dict(reply.arrays) == {}
    elif reply.kind is not Kind.HELLO:
        assert len(site().ledger.entries) in (charges, charges + 1)
    assert site().ledger.spent(POLICY.delta) <= POLICY.max_epsilon


def frame(data: bytes) -> None:
    """Take the bytes as a whole request frame."""
    ask(unpack_request(data))


def parts(data: bytes) -> None:
    """Take the bytes as header and body of a request."""
    ask(unpack_request(_framed(data)))


def proposal(data: bytes) -> None:
    """Take the bytes as the proposal of a request that is right otherwise."""
    text = data.decode("utf-8", "surrogateescape")
    ask(Request(Kind.TRAIN, "run-1", 1, text, HONEST.settings, HONEST.arrays))


def reply(data: bytes) -> None:
    """Take the bytes as header and body of a reply."""
    unpack_reply(_framed(data))


def message(data: bytes) -> None:
    """Take the bytes as JSON of a Flower message: the header, and arrays as [dtype, shape, stype, bytes]."""
    try:
        tree: dict[str, Any] = json.loads(data)
        arrays = {
            name: Array(dtype=dtype, shape=tuple(shape), stype=stype, data=text.encode("latin-1"))
            for name, (dtype, shape, stype, text) in tree.pop("arrays").items()
        }
        headers = {name: ConfigRecord(header) for name, header in tree.items()}
        content = RecordDict({**headers, "arrays": ArrayRecord(arrays)})
        sent = Message(content, dst_node_id=1, message_type="train.round")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # Flower itself takes no such message
    ask(wire.decode_request(sent))


def _framed(data: bytes) -> bytes:
    """Put a right prefix before two bytes that say how long the header is, the header, and the body."""
    size = int.from_bytes(data[:2], "little")
    text, body = data[2 : 2 + size], data[2 + size :]
    return MAGIC + len(text).to_bytes(4, "little") + len(body).to_bytes(8, "little") + text + body


DOORS: tuple[Callable[[bytes], None], ...] = (frame, parts, proposal, reply, message)


def one_input(data: bytes) -> None:
    """Pass one input through the door that its first byte picks.

    Raises:
        Exception: Anything but a WireError of a decoder is a bug.
    """
    try:
        DOORS[data[0] % len(DOORS) if data else 0](data[1:])
    except WireError:
        pass
    except FedmedganError as error:
        raise AssertionError(f"a decoder raised {type(error).__name__}") from error
