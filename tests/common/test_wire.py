import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

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


def _message(header: dict, record: ArrayRecord | None = None, **more: ConfigRecord) -> Message:
    content = {"header": ConfigRecord(header), "arrays": record or ArrayRecord(), **more}
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


def _array(values: np.ndarray, **changes: object) -> Array:
    made = Array(values)
    return Array(**({"dtype": made.dtype, "shape": made.shape, "stype": made.stype, "data": made.data} | changes))


_ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "array",
    [
        _array(_ONES.astype(np.float64)),
        _array(_ONES.astype(np.int64)),
        _array(_ONES, shape=(3, 2)),
        _array(_ONES, data=Array(_ONES).data + b"left over"),
        _array(_ONES, data=Array(_ONES).data[:-1]),
        _array(_ONES, data=b"not an array"),
        _array(_ONES, data=Array(np.asfortranarray(_ONES)).data),
        _array(_ONES, shape=(-1, -6)),
        _array(_ONES, shape=(2**32, 2**32), data=Array(_ONES).data[:128]),
        _array(_ONES, shape=(1,) * 65),
        _array(_ONES, data=b"\x93NUMPY\x01\x00\x20\x00{'descr':'<f4','shape':(1" + b" " * 40),
        _array(_ONES, data=b"\x80\x04\x95" + b"pickle" * 10),
        # a header that claims far more than the bytes that came
        _array(_ONES, data=Array(_ONES).data.replace(b"(2, 3)", b"(2, 9)")),
    ],
)
def test_wrong_array_is_refused(array: Array) -> None:
    with pytest.raises(WireError):
        wire.decode_request(_message(_HEADER, ArrayRecord({"w": array})))


def test_too_many_arrays_or_records_are_refused() -> None:
    many = ArrayRecord({f"w{i}": Array(np.zeros(1, np.float32)) for i in range(wire.MAX_ARRAYS + 1)})
    with pytest.raises(WireError, match="at most"):
        wire.decode_request(_message(_HEADER, many))
    with pytest.raises(WireError, match="records"):
        wire.decode_request(_message(_HEADER, None, third=ConfigRecord()))


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


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float64, ">i4", ">f4", np.int16, np.bool_])
def test_no_other_numbers_travel(dtype: object) -> None:
    request = wire.encode_request(Request(Kind.GRADIENT, "run", 1, "{}"), 7, 60.0)
    reply = Reply(Kind.GRADIENT, "run", 1, None, {}, {"gradient": np.ones(4, dtype)})
    with pytest.raises(WireError, match="float32, float16 or int32"):
        wire.decode_reply(wire.encode_reply(reply, request))
