"""What coordinator and site say of themselves, read strictly."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import Config
from common.errors import WireError
from common.greeting import (
    CAPABILITIES,
    FORMS,
    Greeting,
    Verdict,
    hello_settings,
    parse_greeting,
    parse_hello,
    planned_rounds,
)
from common.messages import PACKAGE_VERSION, PROTOCOL_VERSION
from common.wire import MAX_TEXT_CHARACTERS

VERSIONS = (PROTOCOL_VERSION, PACKAGE_VERSION, "0" * 64, CAPABILITIES)
SAID = Greeting("st-mary", 200, *VERSIONS, Verdict.OVER_BUDGET, 61)

WRONG = {
    "site": ["", "a b", "x" * 65, 1, None],
    "declared_patients": [0, -1, 10**9, True, 1.0, "200"],
    "protocol": [PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1, True, str(PROTOCOL_VERSION)],
    "package": ["", "1.0\n", "1" * 33, "\x1b[2J", 1],
    "proposal_sha256": ["0" * 63, "G" * 64, 0],
    "capabilities": ["", "a " * 200, "\x1b", ["local"]],
    "verdict": ["", "fine", "OK", 0],
    "rounds_allowed": [-1, 10**6, True, 1.0],
}


def test_a_greeting_reads_back() -> None:
    assert parse_greeting(SAID.as_fields()) == SAID


@pytest.mark.parametrize("name", WRONG)
def test_whatever_is_wrong_in_a_greeting_is_refused(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(WireError):
            parse_greeting({**SAID.as_fields(), name: value})
    with pytest.raises(WireError):
        parse_greeting({key: value for key, value in SAID.as_fields().items() if key != name})
    with pytest.raises(WireError):
        parse_greeting({**SAID.as_fields(), "loss": 0.3})


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(list(Verdict)))


@given(st.fixed_dictionaries(dict.fromkeys(SAID.as_fields(), values)))
def test_a_greeting_of_anything_is_read_or_refused(fields: dict[str, object]) -> None:
    try:
        assert parse_greeting(fields).as_fields() == fields
    except WireError:
        pass


def test_the_coordinators_release_reads_back() -> None:
    assert parse_hello(hello_settings()) == PACKAGE_VERSION
    for wrong in ({}, {"package": 1}, {"package": "a b"}, {**hello_settings(), "more": 1}):
        with pytest.raises(WireError):
            parse_hello(wrong)


def test_own_texts_have_their_forms_and_fit_into_a_message() -> None:
    assert dataclasses.asdict(parse_greeting(SAID.as_fields()))["capabilities"] == CAPABILITIES
    assert len(CAPABILITIES) <= MAX_TEXT_CHARACTERS
    assert set(FORMS) == {name for name, value in SAID.as_fields().items() if isinstance(value, str)}


def test_round_0_counts_where_there_is_one() -> None:
    assert planned_rounds(Config.model_validate({"federation": {"rounds": 100}})) == 101
    assert planned_rounds(Config.model_validate({"federation": {"rounds": 100}, "warmup": {"share": 0}})) == 100
