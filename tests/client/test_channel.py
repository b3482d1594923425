import dataclasses
import json
import socket
import threading
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.channel import (
    MAGIC,
    MAX_BODY_BYTES,
    MAX_LISTING_BYTES,
    connect,
    pack_reply,
    pack_request,
    read_frame,
    unpack_reply,
    unpack_request,
)
from common.config import MAX_CLASSES, ImageConfig, ModelConfig, ModelName
from common.errors import RefusalCode, WireError
from common.messages import MAX_DEADLINE, Kind, Reply, Request, Seal
from common.models import MAX_PARAMETERS, outline
from common.weights import weight_shapes

_REQUEST = Request(Kind.TRAIN, "run", 3, '{"x":1}', {"d_steps_per_g_step": 2}, {"w": np.arange(6, dtype=np.float32)})


def test_request_round_trip() -> None:
    got = unpack_request(pack_request(_REQUEST))
    assert (got.kind, got.run_id, got.round, got.proposal, got.settings) == (
        Kind.TRAIN,
        "run",
        3,
        '{"x":1}',
        _REQUEST.settings,
    )
    assert (got.arrays["w"] == _REQUEST.arrays["w"]).all()


@pytest.mark.parametrize("code", [None, RefusalCode.OVER_BUDGET])
def test_reply_round_trip(code: RefusalCode | None) -> None:
    got = unpack_reply(
        pack_reply(Reply(Kind.WARMUP, "run", 0, code, {"epsilon_spent": 1.5}, {"embedding": np.ones((2, 2))}))
    )
    assert (got.refusal, got.fields) == (code, {"epsilon_spent": 1.5})
    assert got.arrays["embedding"].shape == (2, 2)


def test_packing_is_deterministic() -> None:
    assert pack_request(_REQUEST) == pack_request(_REQUEST)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_mutated_frames_never_crash(data: st.DataObject) -> None:
    frame = bytearray(pack_request(_REQUEST))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    for candidate in (bytes(frame), bytes(frame[:cut]), bytes(frame) + b"x"):
        try:
            unpack_request(candidate)
        except WireError:
            pass


@pytest.mark.parametrize(
    "header",
    [
        {"kind": [], "run": "r", "round": 1, "proposal": "", "settings": {}},
        {"kind": "train", "run": [], "round": 1, "proposal": "", "settings": {}},
        {"kind": "train", "run": "r", "round": "1", "proposal": "", "settings": {}},
        {"kind": "train", "run": "r", "round": 1, "proposal": {}, "settings": {}},
        {"kind": "train", "run": "r", "round": 1, "proposal": "", "settings": []},
        {"kind": "train"},
        [],
    ],
)
def test_header_of_another_form_is_refused(header: object) -> None:
    text, body = json.dumps(header).encode(), b"\x02\0\0\0\0\0\0\0{}"
    frame = MAGIC + len(text).to_bytes(4, "little") + len(body).to_bytes(8, "little") + text + body
    with pytest.raises(WireError):
        unpack_request(frame)


@pytest.mark.parametrize("deadline", [0, MAX_DEADLINE - 1])
def test_a_deadline_that_the_link_carries_is_read(deadline: int) -> None:
    sealed = dataclasses.replace(_REQUEST, seal=Seal("00", deadline, "ff"))
    assert unpack_request(pack_request(sealed)).seal == sealed.seal


@pytest.mark.parametrize("deadline", [-1, -(10**400), MAX_DEADLINE, 10**400, True, 1.5, "1"])
def test_a_deadline_out_of_bounds_does_not_decode(deadline: Any) -> None:
    """Whoever signed it: as a number of seconds it would overflow."""
    frame = pack_request(dataclasses.replace(_REQUEST, seal=Seal("00", deadline, "ff")))
    with pytest.raises(WireError, match="seal"):
        unpack_request(frame)


def test_tensor_of_an_unknown_type_is_refused() -> None:
    tensors = b'{"w":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    body = len(tensors).to_bytes(8, "little") + tensors + b"\0\0"
    text = json.dumps({"kind": "train", "run": "r", "round": 1, "proposal": "", "settings": {}}).encode()
    frame = MAGIC + len(text).to_bytes(4, "little") + len(body).to_bytes(8, "little") + text + body
    with pytest.raises(WireError):
        unpack_request(frame)


def test_huge_sizes_are_refused_before_they_are_read() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(MAGIC + (10).to_bytes(4, "little") + (MAX_BODY_BYTES + 1).to_bytes(8, "little"))
        with pytest.raises(WireError, match="at most"):
            read_frame(right, 5.0)


def test_peer_that_stops_early_is_an_error() -> None:
    left, right = socket.socketpair()
    with right:
        left.sendall(pack_request(_REQUEST)[:-5])
        left.close()
        with pytest.raises(WireError, match="closed"):
            read_frame(right, 5.0)


def test_peer_that_trickles_is_given_up_at_the_deadline() -> None:
    """A byte every 10 ms: no single wait is long, and all of them would be."""
    left, right = socket.socketpair()
    stop = threading.Event()

    def trickle() -> None:
        left.sendall(MAGIC + (10).to_bytes(4, "little") + (10**6).to_bytes(8, "little"))
        while not stop.wait(0.01):
            left.sendall(b"x")

    with left, right:
        thread = threading.Thread(target=trickle)
        thread.start()
        with pytest.raises(TimeoutError, match=r"whole frame in 0\.5 s"):
            read_frame(right, 0.5)
        stop.set()
        thread.join()


def test_peer_that_says_nothing_and_leaves_is_no_frame() -> None:
    left, right = socket.socketpair()
    with right:
        left.close()
        assert read_frame(right, 5.0) == b""


def test_an_agent_that_ends_before_it_answers_is_an_os_error(tmp_path) -> None:
    """So that the relay asks again: the same request gets the same answer for the same charge."""
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def end() -> None:
            connection, _ = listener.accept()
            with connection:
                read_frame(connection, 5.0)

        thread = threading.Thread(target=end)
        thread.start()
        with pytest.raises(ConnectionResetError, match="ended before it answered"):
            connect(path, 5.0)(_REQUEST)
        thread.join()


def test_connect_asks_over_a_socket(tmp_path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                request = unpack_request(read_frame(connection, 5.0))
                connection.sendall(pack_reply(Reply(request.kind, request.run_id, request.round)))

        thread = threading.Thread(target=answer)
        thread.start()
        reply = connect(path, 5.0)(_REQUEST)
        thread.join()
    assert (reply.kind, reply.round) == (Kind.TRAIN, 3)


def test_no_agent_is_an_os_error(tmp_path) -> None:
    with pytest.raises(OSError):
        connect(tmp_path / "none.sock", 1.0)(_REQUEST)


def test_a_million_arrays_are_refused_by_the_size_of_their_listing() -> None:
    one = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    listing = b"{" + b",".join(one % number for number in range(10**6)) + b"}"
    body = len(listing).to_bytes(8, "little") + listing
    text = json.dumps({"kind": "train", "run": "r", "round": 1, "proposal": "", "settings": {}, "seal": None}).encode()
    frame = MAGIC + len(text).to_bytes(4, "little") + len(body).to_bytes(8, "little") + text + body
    with pytest.raises(WireError, match="listing"):
        unpack_request(frame)


def test_a_frame_holds_the_largest_model_and_its_listing() -> None:
    assert MAX_BODY_BYTES >= 4 * MAX_PARAMETERS + MAX_LISTING_BYTES
    assert MAX_BODY_BYTES < 10**9
    for name in get_args(ModelName):
        pair = outline(ModelConfig(name=name), ImageConfig(size=128, channels=3), MAX_CLASSES)
        arrays = {name: np.zeros(shape, np.float16) for name, shape in weight_shapes(pair).items()}
        frame = pack_reply(Reply(Kind.TRAIN, "run", 1, None, {}, arrays))
        assert frame.count(b"data_offsets") == len(arrays)
        unpack_reply(frame)


def test_half_a_character_does_not_decode() -> None:
    request = Request(Kind.HELLO, "run-1", 0, "\ud800")
    with pytest.raises(WireError, match="does not decode"):
        unpack_request(pack_request(request))
