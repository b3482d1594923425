"""Every byte that a coordinator can send, through every door: a decoder raises WireError, the agent raises nothing.

Replays the corpus (tests/fuzz/fuzz_request.py says how it grows) and goes on from it with hypothesis.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.channel import unpack_request
from common.config import Proposal
from common.errors import WireError
from common.messages import PROTOCOL_VERSION
from tests.fuzz.targets import DOORS, HONEST, one_input
from tests.hostile_requests import FRAMES

CORPUS = {path.name: path.read_bytes() for path in sorted((Path(__file__).parent / "corpus").iterdir())}
NAMES = [(section, key) for section, info in Proposal.model_fields.items() for key in info.annotation.model_fields]

fuzzed = settings(deadline=None, derandomize=True, max_examples=300)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(2**63), 2**31, 0]),
    st.floats(),
    st.text(),
    st.sampled_from(["", "\0", "\x1b[2J", "../..", "mlp", "NaN", "1e999"]),
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


def test_the_corpus_is_small():
    assert len(CORPUS) <= 40
    assert sum(map(len, CORPUS.values())) < 100_000


@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus_is_harmless(name):
    one_input(CORPUS[name])


@pytest.mark.parametrize("name", FRAMES)
def test_hostile_frames_are_harmless(name):
    one_input(b"\0" + FRAMES[name])


@fuzzed
@given(st.integers(0, len(DOORS) - 1), st.binary(max_size=4096))
def test_any_bytes_are_harmless(door, content):
    one_input(bytes([door]) + content)


@fuzzed
@given(st.sampled_from(sorted(CORPUS)), st.sampled_from(sorted(CORPUS)), st.data())
def test_mutations_of_the_corpus_are_harmless(name, other, data):
    """Bytes changed, cut, doubled, and the end of one input on the start of another."""
    content = bytearray(CORPUS[name])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(1, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut, start = data.draw(st.integers(1, len(content))), data.draw(st.integers(0, len(CORPUS[other])))
    one_input(bytes(content[:cut]) + data.draw(st.sampled_from([b"", CORPUS[other][start:], bytes(content[1:])])))


@fuzzed
@given(st.dictionaries(st.sampled_from(NAMES), trees, min_size=1, max_size=3))
def test_proposals_with_other_values_are_harmless(changes):
    tree = json.loads(HONEST.proposal)
    for (section, key), value in changes.items():
        tree[section][key] = value
    one_input(bytes([2]) + json.dumps(tree).encode())


@fuzzed
@given(trees, trees, trees, trees, st.sampled_from(["train", "warmup", "hello", "evaluate"]))
def test_headers_with_other_values_are_harmless(run, round_, proposal, settings_, kind):
    header = {"kind": kind, "run": run, "round": round_, "proposal": proposal, "settings": settings_, "seal": None}
    text = json.dumps(header).encode()
    one_input(b"\1" + len(text).to_bytes(2, "little") + text + (2).to_bytes(8, "little") + b"{}")


@fuzzed
@given(st.dictionaries(st.sampled_from(["protocol", "kind", "run", "round", "proposal", "scalar.d", "x"]), scalars))
def test_messages_with_other_values_are_harmless(changes):
    header = {"protocol": PROTOCOL_VERSION, "kind": "train", "run": "run-1", "round": 1, "proposal": HONEST.proposal}
    header |= {"nonce": "", "deadline": 0, "signature": "", **changes}
    one_input(b"\4" + json.dumps({"header": header, "arrays": {}}).encode())


@pytest.mark.parametrize("round_", [True, False, 1.0, "1", None, [1]])
def test_a_round_is_a_whole_number_and_no_truth_value(round_):
    header = {"kind": "train", "run": "run-1", "round": round_, "proposal": "", "settings": {}, "seal": None}
    text = json.dumps(header).encode()
    frame = b"FMGC\2\0\0\0" + len(text).to_bytes(4, "little") + (10).to_bytes(8, "little") + text
    with pytest.raises(WireError, match="round as a whole number"):
        unpack_request(frame + (2).to_bytes(8, "little") + b"{}")
