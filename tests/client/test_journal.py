import dataclasses
import json
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from client.journal import Release, append, check_egress, entries, release_schema, reply_shapes
from common.config import Proposal
from common.crypto import SigningKey
from common.errors import PolicyRefusal, RefusalCode, StorageError
from common.features import feature_dim, feature_map
from common.greeting import CAPABILITIES, Greeting, Verdict
from common.look import look_dims
from common.messages import PACKAGE_VERSION, PROTOCOL_VERSION, Kind, Reply
from common.models import build
from common.seal import content_digest
from common.weights import get_weights

KEY = SigningKey.from_bytes(bytes(range(32)))
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SHAPES = {"generator.weight": (2, 3), "discriminator.weight": (3,)}
ALLOWED = release_schema(Kind.TRAIN, SHAPES)
BUDGET = {"epsilon_spent": 1.0, "epsilon_allowed": 10.0}
VERSIONS = (PROTOCOL_VERSION, PACKAGE_VERSION, "0" * 64, CAPABILITIES)
HELLO = Reply(Kind.HELLO, "run", 0, None, Greeting("st-mary", 200, *VERSIONS, Verdict.OK, 9).as_fields())


def train_reply(**changes):
    arrays = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    reply = Reply(Kind.TRAIN, "run", 1, None, {**BUDGET, "fake_accuracy": 0.75, "d_steps_per_g_step": 4}, arrays)
    return dataclasses.replace(reply, **changes)


def test_what_is_on_the_list_passes():
    check_egress(train_reply(), ALLOWED)
    check_egress(HELLO, release_schema(Kind.HELLO, {}))
    embedding = {"embedding": np.zeros((10, 4), np.float32)}
    warmup = Reply(Kind.WARMUP, "run", 0, None, BUDGET, embedding)
    check_egress(warmup, release_schema(Kind.WARMUP, {"embedding": (10, 4)}))


def refused(reply, allowed=ALLOWED):
    with pytest.raises(PolicyRefusal) as caught:
        check_egress(reply, allowed)
    assert caught.value.code is RefusalCode.INTERNAL
    return str(caught.value)


FORBIDDEN = {
    "loss on patients": ("loss", 0.31),
    "accuracy on patients": ("real_accuracy", 0.9),
    "exact cohort": ("patients", 187),
    "batch size": ("batch_size", 61),
    "label counts": ("label_counts", "12,175"),
    "timing": ("seconds", 1.25),
    "exception text": ("error", "KeyError: 'DOE^JANE'"),
    "file name": ("path", "/export/dicom/doe.dcm"),
    "tag": ("PatientID", "4711"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_closed_list_keeps_out(what):
    name, value = FORBIDDEN[what]
    reply = train_reply(fields={**train_reply().fields, name: value})
    assert str(value) not in refused(reply)


TEXTS = ["KeyError: 'DOE^JANE'", "/export/doe.dcm", "a\n", "x" * 65, "jane doe"]


@pytest.mark.parametrize("field", ["site", "package", "proposal_sha256", "capabilities", "verdict"])
@pytest.mark.parametrize("text", TEXTS)
def test_closed_list_keeps_other_text_out_of_a_greeting(field, text):
    hello = dataclasses.replace(HELLO, fields={**HELLO.fields, field: text})
    assert text not in refused(hello, release_schema(Kind.HELLO, {}))


def test_closed_list_keeps_other_fields_out_of_a_greeting():
    for extra in FORBIDDEN.values():
        refused(dataclasses.replace(HELLO, fields={**HELLO.fields, **dict([extra])}), release_schema(Kind.HELLO, {}))
    for name in HELLO.fields:
        fields = {key: value for key, value in HELLO.fields.items() if key != name}
        refused(dataclasses.replace(HELLO, fields=fields), release_schema(Kind.HELLO, {}))


@pytest.mark.parametrize("value", [1, True, "1.0", np.float64(1.0), np.float32(1.0), float("nan"), float("inf"), None])
def test_closed_list_keeps_out_fields_of_another_type(value):
    refused(train_reply(fields={**train_reply().fields, "epsilon_spent": value}))


def test_closed_list_keeps_out_missing_fields():
    refused(train_reply(fields=BUDGET))


ARRAYS = {
    "extra": {"extra": np.ones(1, np.float32)},
    "missing": {"generator.weight": None},
    "shape": {"generator.weight": np.ones((3, 2), np.float32)},
    "rank": {"generator.weight": np.ones((2, 3, 1), np.float32)},
    "float64": {"generator.weight": np.ones((2, 3))},
    "byte order": {"generator.weight": np.ones((2, 3), ">f4")},
    "NaN": {"generator.weight": np.full((2, 3), np.nan, np.float32)},
    "infinity": {"generator.weight": np.full((2, 3), -np.inf, np.float32)},
    "masked": {"generator.weight": np.ma.masked_array(np.ones((2, 3), np.float32))},
    "list": {"generator.weight": [[1.0] * 3] * 2},
}


@pytest.mark.parametrize("what", ARRAYS)
def test_closed_list_keeps_out_arrays(what):
    arrays = {name: array for name, array in {**train_reply().arrays, **ARRAYS[what]}.items() if array is not None}
    refused(train_reply(arrays=arrays))


def test_a_refusal_carries_nothing_but_its_code():
    check_egress(Reply(Kind.TRAIN, "run", 1, RefusalCode.NO_DATA), ALLOWED)
    refused(train_reply(refusal=RefusalCode.NO_DATA))
    refused(Reply(Kind.TRAIN, "run", 1, RefusalCode.NO_DATA, {"reason": "KeyError"}), Release({}, {"reason": str}))
    refused(train_reply(refusal=RefusalCode.NO_DATA, fields={}))


@pytest.mark.parametrize("what", FORBIDDEN)
@pytest.mark.parametrize("kind", Kind)
def test_closed_list_keeps_out_of_an_error_reply(kind, what):
    name, value = FORBIDDEN[what]
    for fields, arrays in (({name: value}, {}), ({}, {name: np.ones(3, np.float32)})):
        reply = Reply(kind, "run", 0, RefusalCode.INTERNAL, fields, arrays)
        assert str(value) not in refused(reply, release_schema(kind, {}))
        assert str(value) not in refused(reply, Release({name: ((3,), "float32")}, {name: type(value)}))


@pytest.mark.parametrize("what", FORBIDDEN)
@pytest.mark.parametrize("kind", Kind)
def test_closed_list_holds_nothing_forbidden_for_any_kind(kind, what):
    name, value = FORBIDDEN[what]
    schema = release_schema(kind, {"embedding": (2, 3)})
    assert name not in schema.fields
    values = {int: 1, float: 1.0, str: "st-mary"}
    fields = {known: HELLO.fields.get(known, values[expected]) for known, expected in schema.fields.items()}
    arrays = {"embedding": np.ones((2, 3), schema.arrays["embedding"][1])}
    check_egress(Reply(kind, "run", 0, None, fields, arrays), schema)
    refused(Reply(kind, "run", 0, None, {**fields, name: value}, arrays), schema)
    refused(Reply(kind, "run", 0, None, fields, {**arrays, name: np.ones(1, np.float32)}), schema)


def test_bounded_to_the_byte():
    assert ALLOWED.size_bytes == 36
    check_egress(train_reply(), ALLOWED, 36)
    with pytest.raises(PolicyRefusal, match=r"36 bytes are more than max_reply_bytes=35") as caught:
        check_egress(train_reply(), ALLOWED, 35)
    assert caught.value.code is RefusalCode.INTERNAL


def test_shapes_of_a_reply_follow_from_public_values_alone():
    proposal = Proposal.model_validate({"image": {"size": 28, "classes": ("a", "b", "c")}})
    pair = build(proposal.model, proposal.image, 3, torch.Generator().manual_seed(0))
    shapes = reply_shapes(proposal, pair)
    assert {name: array.shape for name, array in get_weights(pair).items()} == shapes
    assert reply_shapes(proposal, feature_dim(feature_map(28))) == {"embedding": (3, feature_dim(feature_map(28)))}
    for dim in look_dims(proposal.image).values():
        assert reply_shapes(proposal, dim) == {"embedding": (3, dim)}


def test_digest_sees_every_part_and_no_order():
    reply = train_reply()
    digest = content_digest(reply)
    swapped = train_reply(arrays=dict(reversed(reply.arrays.items())), fields=dict(reversed(reply.fields.items())))
    assert content_digest(swapped) == digest
    ones = reply.arrays["generator.weight"]
    others = [
        train_reply(fields={**reply.fields, "fake_accuracy": 0.5}),
        train_reply(arrays={**reply.arrays, "generator.weight": ones * 2}),
        train_reply(arrays={**reply.arrays, "generator.weight": ones.reshape(3, 2)}),
        train_reply(arrays={**reply.arrays, "generator.weight": ones.view(np.int32)}),
        train_reply(arrays={"a": ones, "discriminator.weight": reply.arrays["discriminator.weight"]}),
        train_reply(refusal=RefusalCode.NO_DATA),
    ]
    assert len({digest, *map(content_digest, others)}) == 7
    assert len(content_digest(train_reply(arrays={"scalar": np.array(1.0)}))) == 64


def test_append_and_read(tmp_path):
    append(tmp_path, KEY, train_reply(), 1.5, NOW)
    append(tmp_path, KEY, train_reply(round=2), 2.5, NOW)
    first, second = entries(tmp_path, KEY.verify_key)
    assert dataclasses.astuple(first) == (
        NOW.isoformat(),
        "run",
        1,
        Kind.TRAIN,
        content_digest(train_reply()),
        36,
        1.5,
    )
    assert (second.round, second.epsilon_after) == (2, 2.5)


def test_once_for_the_same_release(tmp_path):
    for _ in range(3):
        append(tmp_path, KEY, train_reply(), 1.5, NOW)
    assert len(entries(tmp_path, KEY.verify_key)) == 1


def test_one_release_per_charge(tmp_path):
    append(tmp_path, KEY, train_reply(), 1.5, NOW)
    with pytest.raises(PolicyRefusal, match="something else") as caught:
        append(tmp_path, KEY, train_reply(fields={**train_reply().fields, "fake_accuracy": 0.5}), 1.5, NOW)
    assert caught.value.code is RefusalCode.REPLAYED
    hello = Reply(Kind.HELLO, "run", 0, None, {"declared_patients": 200})
    append(tmp_path, KEY, hello, 0.0, NOW)
    append(tmp_path, KEY, dataclasses.replace(hello, fields={"declared_patients": 300}), 0.0, NOW)  # costs nothing
    assert len(entries(tmp_path, KEY.verify_key)) == 3


def test_a_refusal_after_a_charge_is_an_outcome_of_no_bytes(tmp_path):
    append(tmp_path, KEY, train_reply(), 1.5, NOW)
    append(tmp_path, KEY, Reply(Kind.TRAIN, "run", 2, RefusalCode.INTERNAL), 1.5, NOW)
    assert [entry.size_bytes > 0 for entry in entries(tmp_path, KEY.verify_key)] == [True, False]


def test_tampering_is_seen(tmp_path):
    for number in (1, 2):
        append(tmp_path, KEY, train_reply(round=number), 1.5, NOW)
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[0])["size_bytes"] == 36
    for content in (lines[0], lines[1] + lines[0], lines[0].replace(b"1.5", b"0.5") + lines[1]):
        path.write_bytes(content)
        with pytest.raises(StorageError, match="journal"):
            entries(tmp_path, KEY.verify_key)
    with pytest.raises(StorageError, match="journal"):
        entries(tmp_path, SigningKey.generate().verify_key)
