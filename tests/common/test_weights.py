"""Weights as they travel: rounded to 16 bits and back."""

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from client.channel import pack_reply, unpack_reply
from common import wire
from common.config_text import build_config
from common.errors import ConfigError, WireError
from common.messages import Kind, Reply, Request, size_bytes
from common.models import build
from common.weights import LARGEST_FLOAT16, check_arrays, for_transport, get_weights, release_dtype, set_weights
from tests.tiny_site import PROPOSAL, make_weights

TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

_numbers = arrays(np.float32, array_shapes(min_dims=0, max_dims=3, max_side=4), elements=st.floats(width=32))
_finite = arrays(
    np.float32,
    array_shapes(max_dims=3, max_side=4),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def test_bytes_halve_and_float32_is_left_alone() -> None:
    weights = make_weights()
    assert 2 * size_bytes(for_transport(weights, "float16")) == size_bytes(weights)
    assert for_transport(weights, "float32") is weights


@settings(deadline=None, derandomize=True, max_examples=200)
@given(_finite)
def test_a_weight_keeps_eleven_bits(array: np.ndarray) -> None:
    rounded = for_transport({"w": array}, "float16")["w"].astype(np.float64)
    exact = np.clip(array.astype(np.float64), -LARGEST_FLOAT16, LARGEST_FLOAT16)
    assert rounded.shape == array.shape
    assert (np.abs(rounded - exact) <= np.maximum(np.abs(exact) * 2.0**-11, 2.0**-25)).all()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(_numbers)
def test_repeatable(array: np.ndarray) -> None:
    once = for_transport({"w": array}, "float16")
    again = for_transport({"w": once["w"].astype(np.float32)}, "float16")
    assert once["w"].tobytes() == again["w"].tobytes()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(_numbers)
def test_saturates(array: np.ndarray) -> None:
    rounded = for_transport({"w": array}, "float16")["w"]
    assert (np.isfinite(rounded) == np.isfinite(array)).all()
    assert (np.isnan(rounded) == np.isnan(array)).all()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.dictionaries(st.text(min_size=1, max_size=20), _finite, max_size=4))
def test_round_trip_over_both_channels(named: dict) -> None:
    """By Flower's messages and by the agent's socket, on which what travels is also stored."""
    sent = for_transport(named, "float16")
    request = Request(Kind.TRAIN, "run", 1, "{}", {}, sent)
    reply = Reply(Kind.TRAIN, "run", 1, None, {}, sent)
    message = wire.encode_request(request, 7, 60.0)
    for got in (
        wire.decode_request(message).arrays,
        wire.decode_reply(wire.encode_reply(reply, message)).arrays,
        unpack_reply(pack_reply(reply)).arrays,
    ):
        assert got.keys() == sent.keys()
        for name, array in sent.items():
            assert (got[name].dtype, got[name].shape) == (np.float16, array.shape)
            assert got[name].tobytes() == array.tobytes()


def test_widened_weights_are_what_was_sent() -> None:
    sent = for_transport(make_weights(), "float16")
    pair = build(PROPOSAL.model, PROPOSAL.image, 2, torch.Generator().manual_seed(1))
    set_weights(pair, sent, transport="float16")
    for name, array in get_weights(pair).items():
        assert array.dtype == np.float32
        assert (array == sent[name]).all()
    with pytest.raises(WireError, match="float32"):
        set_weights(pair, sent)
    with pytest.raises(WireError, match="float16"):
        set_weights(pair, make_weights(), transport="float16")


def test_swapped_bytes_are_refused() -> None:
    with pytest.raises(WireError, match="float16"):
        check_arrays({"w": np.zeros(2, ">f2")}, {"w": (2,)}, "float16")


def test_only_weights_of_a_round_are_rounded() -> None:
    halved = build_config(PROPOSAL.model_dump(), {"federation.transport": "float16"})
    assert release_dtype(halved, Kind.TRAIN) == "float16"
    assert release_dtype(halved, Kind.WARMUP) == "float32"
    together = build_config({}, {"train.algorithm": "secure-sum", "train.steps_per_round": 1})
    assert {release_dtype(together, kind) for kind in (Kind.WARMUP, Kind.GRADIENT)} == {"int32"}
    with pytest.raises(ConfigError, match=r"whole numbers.*remove federation\.transport = float16"):
        build_config(together.model_dump(), {"federation.transport": "float16"})
