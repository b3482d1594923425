import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import save

from common import wire
from common.errors import RefusalCode, WireError
from common.messages import PROTOCOL_VERSION, Kind, Reply, Request

TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

_finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
_named = st.dictionaries(
    st.text(min_size=1, max_size=20),
    arrays(np.float32, array_shapes(max_dims=3, max_side=4), elements=_finite),
    max_size=4,
)
_scalars = st.dictionaries(
    st.text(min_size=1, max_size=10), st.one_of(st.integers(-5, 5), st.floats(0, 1), st.text(max_size=9)), max_size=3
)


def _same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        (left[n] == right[n]).all() and left[n].shape == right[n].shape for n in left
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.sampled_from(Kind), st.integers(0, 9), _named, _scalars)
def test_request_round_trip(kind: Kind, number: int, named: dict, scalars: dict) -> None:
    request = Request(kind, "run-1", number, '{"a":1}', scalars, named)
    decoded = wire.decode_request(wire.encode_request(request, 7, 60.0))
    assert (decoded.kind, decoded.run_id, decoded.round, decoded.proposal) == (kind, "run-1", number, '{"a":1}')
    assert decoded.settings == scalars
    assert _same(dict(decoded.arrays), named)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.sampled_from([None, *RefusalCode]), _named, _scalars)
def test_reply_round_trip(code: RefusalCode | None, named: dict, scalars: dict) -> None:
    request = wire.encode_request(Request(Kind.TRAIN, "run", 1, "{}"), 7, 60.0)
    decoded = wire.decode_reply(wire.encode_reply(Reply(Kind.TRAIN, "run", 1, code, scalars, named), request))
    assert (decoded.refusal, decoded.fields) == (code, scalars)
    assert _same(dict(decoded.arrays), named)


def _record(body: bytes, **changes: object) -> ArrayRecord:
    whole = {"dtype": "uint8", "shape": (len(body),), "stype": "safetensors", "data": body} | changes
    return ArrayRecord({"body": Array(**whole)})


def _message(header: dict, record: ArrayRecord | None = None, **more: ConfigRecord) -> Message:
    content = {"header": ConfigRecord(header), "arrays": record or _record(save({})), **more}
    return Message(RecordDict(content), dst_node_id=1, message_type="train.round")


_HEADER = {"protocol": PROTOCOL_VERSION, "kind": "train", "run": "run", "round": 1, "proposal": "{}"}
_HEADER |= {"nonce": "", "deadline": 0, "signature": ""}


@pytest.mark.parametrize(
    "header",
    [
        _HEADER | {"protocol": 1},
        _HEADER | {"kind": "evaluate"},
        _HEADER | {"extra": 1},
        {k: v for k, v in _HEADER.items() if k != "run"},
        _HEADER | {"round": -1},
        _HEADER | {"round": True},
        _HEADER | {"round": "1"},
        _HEADER | {"run": "x" * 300},
        _HEADER | {"proposal": "x" * 100_000},
        _HEADER | {"scalar.a": float("nan")},
        _HEADER | {"scalar.a": [1, 2]},
        _HEADER | {"scalar.a": b"bytes"},
        _HEADER | {f"scalar.{i}": i for i in range(100)},
    ],
)
def test_wrong_header_is_refused(header: dict) -> None:
    with pytest.raises(WireError):
        wire.decode_request(_message(header))


_ONES = np.ones((2, 3), np.float32)
_BODY = save({"w": _ONES})


def _listed(listing: bytes, data: bytes = b"") -> bytes:
    return len(listing).to_bytes(8, "little") + listing + data


def test_the_honest_message_of_these_tests_passes() -> None:
    assert wire.decode_request(_message(_HEADER, _record(_BODY))).arrays["w"].tolist() == _ONES.tolist()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not a body",
        _BODY + b"left over",
        _BODY[:-1],
        save({"w": _ONES.astype(np.float64)}),
        save({"w": _ONES.astype(np.int64)}),
        save({"w": np.ones((1,) * (wire.MAX_DIMENSIONS + 1), np.float32)}),
        save({"w" * (wire.MAX_NAME_CHARACTERS + 1): _ONES}),
        _listed(b'{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}', bytes(23)),
        _listed(b'{"w":{"dtype":"F32","shape":[3,3],"data_offsets":[0,24]}}', bytes(24)),
        _listed(b'{"w":{"dtype":"F32","shape":[-2,-3],"data_offsets":[0,24]}}', bytes(24)),
        _listed(b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,24]}}', bytes(24)),
        _listed(b'{"w":{"dtype":"F32","shape":[6],"data_offsets":[8,32]}}', bytes(32)),
        _listed(b'{"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
        _listed(b"[" * 100_000),
        # a listing that claims far more than the bytes that came
        (2**63).to_bytes(8, "little") + _BODY[8:],
        b"\x80\x04\x95" + b"pickle" * 10,
    ],
)
def test_wrong_body_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_request(_message(_HEADER, _record(body)))


def test_arrays_in_any_other_form_are_refused() -> None:
    for record in (
        ArrayRecord(),
        ArrayRecord({"w": Array(_ONES)}),
        ArrayRecord({"body": Array(_ONES)}),
        ArrayRecord({"body": _record(_BODY)["body"], "w": Array(_ONES)}),
    ):
        with pytest.raises(WireError, match="one safetensors body"):
            wire.decode_request(Message(RecordDict({"header": ConfigRecord(_HEADER), "arrays": record}), 1, "train.a"))


def test_too_many_arrays_or_records_are_refused() -> None:
    many = _record(save({f"w{i}": np.zeros(1, np.float32) for i in range(wire.MAX_ARRAYS + 1)}))
    with pytest.raises(WireError, match="at most"):
        wire.decode_request(_message(_HEADER, many))
    with pytest.raises(WireError, match="records"):
        wire.decode_request(_message(_HEADER, None, third=ConfigRecord()))


def test_a_million_tiny_arrays_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = (
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"
    )
    monkeypatch.setattr(wire, "load_tensors", lambda _: pytest.fail("read"))
    with pytest.raises(WireError, match="listing"):
        wire.decode_request(_message(_HEADER, _record(_listed(listing))))


def test_the_most_that_is_allowed_passes() -> None:
    letter = "\u0001"  # six bytes in the listing
    names = [letter * (wire.MAX_NAME_CHARACTERS - 3) + f"{i:03d}" for i in range(wire.MAX_ARRAYS)]
    arrays = {name: np.zeros((1,) * wire.MAX_DIMENSIONS, np.float32) for name in names}
    request = Request(Kind.TRAIN, "run", 1, "{}", {}, arrays)
    assert set(wire.decode_request(wire.encode_request(request, 7, 60.0)).arrays) == set(names)


def test_arrays_that_nodes_share_are_written_once() -> None:
    arrays = {"w": _ONES}
    first, second, third = (
        Request(Kind.TRAIN, "run", number, "{}", {}, shared)
        for number, shared in ((1, arrays), (2, arrays), (3, {"w": 2 * _ONES}))
    )
    messages = wire.encode_requests({5: first, 6: second, 7: third}, 60.0)
    assert [message.metadata.dst_node_id for message in messages] == [5, 6, 7]
    assert [wire.decode_request(message).round for message in messages] == [1, 2, 3]
    bodies = [message.content["arrays"]["body"] for message in messages]
    assert bodies[0] is bodies[1]
    assert bodies[2] is not bodies[0]


def test_a_message_has_six_parts_however_many_arrays() -> None:
    """Flower asks for each part by itself, and that is what a round's time went to."""
    arrays = {f"w{i}": np.full(9, i, np.float32) for i in range(40)}
    message = wire.encode_request(Request(Kind.TRAIN, "run", 1, "{}", {}, arrays), 7, 60.0)
    assert len(get_all_nested_objects(message)) == 6


def test_unknown_refusal_code_is_refused() -> None:
    header = {"protocol": PROTOCOL_VERSION, "kind": "train", "run": "run", "round": 1, "refusal": "patient 123 failed"}
    header["signature"] = ""
    with pytest.raises(WireError):
        wire.decode_reply(_message(header))


def test_whole_numbers_travel_as_they_are() -> None:
    request = wire.encode_request(Request(Kind.GRADIENT, "run", 1, "{}"), 7, 60.0)
    numbers = np.array([-(2**31) + 1, -1, 0, 2**24 + 1, 2**31 - 1], np.int32)
    reply = Reply(Kind.GRADIENT, "run", 1, None, {}, {"gradient": numbers})
    decoded = wire.decode_reply(wire.encode_reply(reply, request)).arrays["gradient"]
    assert decoded.dtype == np.int32
    np.testing.assert_array_equal(decoded, numbers)


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float64, np.int16, np.bool_])
def test_no_other_numbers_travel(dtype: object) -> None:
    request = wire.encode_request(Request(Kind.GRADIENT, "run", 1, "{}"), 7, 60.0)
    reply = Reply(Kind.GRADIENT, "run", 1, None, {}, {"gradient": np.ones(4, dtype)})
    with pytest.raises(WireError, match="float32, float16 or int32"):
        wire.decode_reply(wire.encode_reply(reply, request))
