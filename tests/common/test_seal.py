"""Signed questions and answers: every bit of them is under the signature, and an answer is one to one question."""

import dataclasses

import numpy as np
import pytest

from common.crypto import SigningKey
from common.errors import PolicyRefusal, RefusalCode, WireError
from common.messages import Kind, Reply, Request
from common.seal import check_reply, check_request, require_in_time, seal_request, sign_reply

COORDINATOR, SITE, OTHER = (SigningKey(bytes([number]) * 32) for number in (1, 2, 3))
ARRAYS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
REQUEST = Request(Kind.TRAIN, "run-1", 3, '{"a": 1}', {"d_steps_per_g_step": 2}, ARRAYS)
REPLY = Reply(Kind.TRAIN, "run-1", 3, None, {"epsilon_spent": 1.0}, ARRAYS)


def changes(arrays):
    turned, other = arrays["w"].reshape(3, 2), arrays["w"] + 1
    yield {"kind": Kind.WARMUP}
    yield {"run_id": "run-2"}
    yield {"round": 4}
    yield from ({"arrays": {"w": turned}}, {"arrays": {"w": other}}, {"arrays": {"v": arrays["w"]}}, {"arrays": {}})
    yield {"arrays": {"w": arrays["w"].view(np.int32)}}


def test_whole_request():
    honest = seal_request(COORDINATOR, REQUEST, 1000.0, SITE.verify_key)
    check_request(COORDINATOR.verify_key, honest, 1000.0, SITE.verify_key)
    seal = honest.seal
    others = [dataclasses.replace(honest, **change) for change in changes(ARRAYS)]
    others += [dataclasses.replace(honest, proposal='{"a": 2}'), dataclasses.replace(honest, settings={})]
    others += [
        dataclasses.replace(honest, seal=dataclasses.replace(seal, **change))
        for change in ({"nonce": "0" * 32}, {"deadline": 1001}, {"signature": ""}, {"signature": "xy"})
    ]
    others += [dataclasses.replace(honest, seal=dataclasses.replace(seal, signature="00" * n)) for n in (1, 64, 65)]
    others += [REQUEST, seal_request(OTHER, REQUEST, 1000.0, SITE.verify_key)]
    for other in others:
        with pytest.raises(WireError):
            check_request(COORDINATOR.verify_key, other, 1000.0, SITE.verify_key)


def test_one_site():
    for kind in set(Kind) - {Kind.HELLO}:
        request = dataclasses.replace(REQUEST, kind=kind)
        for sealed in (
            seal_request(COORDINATOR, request, 1000.0, OTHER.verify_key),
            seal_request(COORDINATOR, request, 1000.0),
        ):
            with pytest.raises(WireError):
                check_request(COORDINATOR.verify_key, sealed, 1000.0, SITE.verify_key)
    hello = seal_request(COORDINATOR, dataclasses.replace(REQUEST, kind=Kind.HELLO), 1000.0)
    for site in (SITE, OTHER):
        check_request(COORDINATOR.verify_key, hello, 1000.0, site.verify_key)


def test_stale_requests_cost_nothing():
    honest = seal_request(COORDINATOR, REQUEST, 1000.0, SITE.verify_key)
    with pytest.raises(PolicyRefusal, match=r"Round 3|round 3") as caught:
        check_request(COORDINATOR.verify_key, honest, 1001.5, SITE.verify_key)
    assert caught.value.code is RefusalCode.EXPIRED
    require_in_time(honest, 1000.0)
    require_in_time(REQUEST, 1e12)
    with pytest.raises(PolicyRefusal, match="over by 2 s"):
        require_in_time(honest, 1001.5)


def test_every_request_has_a_nonce_of_its_own():
    nonces = {seal_request(COORDINATOR, REQUEST, 1000.0, SITE.verify_key).seal.nonce for _ in range(100)}
    assert len(nonces) == 100
    assert all(len(nonce) == 32 for nonce in nonces)


def test_one_question():
    asked, again = (seal_request(COORDINATOR, REQUEST, 1000.0, SITE.verify_key) for _ in range(2))
    signed = sign_reply(SITE, asked, REPLY)
    check_reply(SITE.verify_key, asked, signed)
    with pytest.raises(WireError):
        check_reply(SITE.verify_key, again, signed)
    with pytest.raises(WireError):
        check_reply(OTHER.verify_key, asked, signed)
    for question in changes(ARRAYS):
        with pytest.raises(WireError):
            check_reply(SITE.verify_key, dataclasses.replace(asked, **question), signed)
    for answer in (*changes(ARRAYS), {"fields": {}}, {"refusal": RefusalCode.POLICY}, {"signature": ""}):
        with pytest.raises(WireError):
            check_reply(SITE.verify_key, asked, dataclasses.replace(signed, **answer))


def test_without_a_seal_nothing_is_signed():
    assert sign_reply(SITE, REQUEST, REPLY).signature == ""
