"""Parts of messages as Flower makes them, and as somebody does who wants the other side's memory or time."""

import json
import random
import threading
import time
from collections import Counter

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    validate_object_content,
)
from flwr.supercore.task_identity import TaskIdentity

from common import parts as module
from common import wire
from common.errors import WireError
from common.messages import Kind, Reply, Request
from common.parts import check_parts, fetch_parts

CHUNK = bytes(1 << 16)


def deflated(message: Message) -> dict[str, bytes]:
    return {name: part.deflate() for name, part in get_all_nested_objects(message).items()}


def made_up(kind: str, children: list[str], body: bytes) -> bytes:
    """A part as anybody can write it; the link takes it."""
    content = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
    validate_object_content(content)
    return content


def array(children: list[str], places: object) -> dict[str, bytes]:
    body = json.dumps({"dtype": "uint8", "shape": [1], "stype": "safetensors", "arraychunk_ids": places}).encode()
    content = made_up("Array", children, body)
    return {get_object_id(content): content}


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 8, 1


def chunk(body: bytes = CHUNK) -> dict[str, bytes]:
    content = made_up("ArrayChunk", [], body)
    return {get_object_id(content): content}


def test_what_is_ours_passes() -> None:
    arrays = {"w": np.random.default_rng(0).normal(size=3_000_000).astype(np.float32)}  # three chunks
    request = Request(Kind.TRAIN, "run-1", 1, "p" * 65_536, {"loss": 0.5}, arrays)
    question = wire.encode_request(request, 5, 60.0)
    reply = Message(RecordDict(), reply_to=question)
    assert len(deflated(question)) == 8
    for honest in (question, reply, Message(Error(2, "word"), reply_to=question)):
        made = deflated(honest)
        assert fetch_parts(list(made), made.__getitem__, 5.0) == made


@pytest.mark.parametrize("places", [[0] * 400, [0, -1], [0, False]])
def test_no_larger_together(places: list[int]) -> None:
    (name,), body = chunk(), chunk()
    with pytest.raises(WireError, match="each chunk of an array once"):
        check_parts(body | array([name], places))


def test_no_larger_together_under_two_places_or_in_two_arrays() -> None:
    (name,), body = chunk(), chunk()
    twice = array([name, name], [0, 1])
    others = array([name], [0])
    other = array([name], [0.0])
    with pytest.raises(WireError, match="each chunk"):
        check_parts(body | twice)
    with pytest.raises(WireError, match="TypeError"):
        check_parts(body | other)
    second = {"other": made_up("Array", [name], b'{"arraychunk_ids":[0]}')}
    with pytest.raises(WireError, match="each chunk"):
        check_parts(body | others | second)


def test_no_larger_together_by_an_array_of_arrays() -> None:
    """Flower joins whatever child has data."""
    (name,), body = chunk(), chunk()
    inner = array([name], [0])
    with pytest.raises(WireError, match="arrays of chunks"):
        check_parts(body | inner | array(list(inner), [0]))


@pytest.mark.parametrize(
    "content",
    [
        b"no part",
        b"",
        b"Array  2\0{}",
        b'Array  22\0{"arraychunk_ids":[7]}',
        b"Array  200001\0" + b"[" * 200_001,
        b"Array  2\0\xff\xff",
        b"ArrayChunk",
        b"ArrayChunk x",
        b"Message a b c 4\0aaaa",
    ],
)
def test_what_is_no_part_is_refused(content: bytes) -> None:
    with pytest.raises(WireError):
        check_parts({"a": content})


def test_heads_are_small() -> None:
    names = ["0" * 64] * 100
    with pytest.raises(WireError):
        check_parts({"a": made_up("ArrayChunk", names, b"")})
    with pytest.raises(WireError, match="without children"):
        check_parts({"a": b"ArrayChunk a 0\0"})
    large = made_up("ConfigRecord", [], bytes(module.MAX_HEADS_BYTES // 2))
    check_parts({"a": large})
    with pytest.raises(WireError, match="beside the arrays"):
        check_parts({"a": large, "b": large})


def test_bounded_while_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MESSAGE_BYTES", 10 * len(CHUNK))
    asked, lock = [0], threading.Lock()

    def pull(name: str) -> bytes:
        with lock:
            asked[0] += 1
        return b"ArrayChunk  65536\0" + CHUNK

    with pytest.raises(WireError, match="bytes"):
        fetch_parts([str(number) for number in range(1000)], pull, 5.0)
    assert asked[0] < 100
    with pytest.raises(WireError, match="parts"):
        fetch_parts(["a"] * (module.MAX_OBJECTS + 1), pull, 5.0)


def test_ends_in_time() -> None:
    def never(name: str) -> bytes:
        raise ObjectUnavailableError(name)

    started = time.monotonic()
    with pytest.raises(ObjectPullError):
        fetch_parts(["a", "b"], never, 0.3)
    assert 0.3 <= time.monotonic() - started < 10
    assert fetch_parts(["a"], lambda _: b"ArrayChunk  1\0a", 0.0)  # what is there is taken


def test_made_up_is_all_that_flower_raises() -> None:
    """Parts of a message, changed at random: bytes, lengths, kinds, children. What comes of them is known."""
    reply = wire.encode_reply(Reply(Kind.TRAIN, "run-1", 1), Message(RecordDict(), dst_node_id=5, message_type="train"))
    honest, rng, found = deflated(reply), random.Random(3), Counter[str]()
    for _ in range(3000):
        parts = dict(honest)
        for name in rng.choices(list(parts), k=2):
            parts[name] = _changed(parts[name], rng, list(parts))
        try:
            check_parts(parts)
            made = inflate_object_from_contents(reply.object_id, parts)
        except (*module.MADE_UP, WireError) as error:
            found[type(error).__name__] += 1
        else:
            found[type(made).__name__] += 1
    assert found["Message"] > 100
    assert found["IndexError"] > 20  # a message with neither a content nor an error


def _changed(part: bytes, rng: random.Random, names: list[str]) -> bytes:
    head, _, body = part.partition(b"\0")
    kind, children, _ = head.decode().split(" ")
    change = rng.randrange(5)
    if change == 0:
        body = body[: rng.randrange(len(body) + 1)]
    elif change == 1 and body:
        place = rng.randrange(len(body))
        body = body[:place] + rng.randbytes(3) + body[place:]
    elif change == 2:
        children = ",".join(rng.choices(names, k=rng.randrange(3)))
    elif change == 3:
        kind = rng.choice(("Message", "RecordDict", "ConfigRecord", "ArrayRecord", "Array", "ArrayChunk", "Nothing"))
    return f"{kind} {children} {len(body)}".encode() + b"\0" + body
