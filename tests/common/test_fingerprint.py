"""Words that two people compare by phone."""

import sys

import pytest
import typer

from common.crypto import SigningKey, VerifyKey
from common.errors import EnrolmentError
from common.fingerprint import NUMBER_OF_WORDS, WORDS, require_words, words_of

KEY = SigningKey(bytes(range(32))).verify_key


class Terminal:
    def isatty(self):
        return True


def test_told_apart():
    assert len(WORDS) == len({word[:3] for word in WORDS}) == 256
    assert all(word.isascii() and word.islower() and word.isalpha() for word in WORDS)
    keys = [SigningKey(bytes([number]) * 32).verify_key for number in range(50)]
    assert len({words_of(key, "site") for key in keys}) == 50
    assert words_of(KEY, "site") != words_of(KEY, "coordinator")


def test_words_never_change_between_releases():
    assert words_of(VerifyKey(KEY.to_bytes()), "site") == VECTOR
    assert len(VECTOR.split()) == NUMBER_OF_WORDS


VECTOR = "pumpkin ladder metal basket piano kayak balcony opera"


def test_typed_words_are_compared(monkeypatch):
    right = words_of(KEY, "site")
    require_words(KEY, "site", right)
    require_words(KEY, "site", "  " + right.upper().replace(" ", ",  ") + " ")
    for wrong in ("", right.rsplit(" ", 1)[0], right + " acorn", words_of(KEY, "coordinator"), right[:-1]):
        with pytest.raises(EnrolmentError, match=r"[Nn]othing was changed here"):
            require_words(KEY, "site", wrong)


def test_nobody_to_ask_is_a_refusal():
    with pytest.raises(EnrolmentError, match="--words"):
        require_words(KEY, "site", None)


def test_a_person_is_asked(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(typer, "confirm", lambda _question: True)
    require_words(KEY, "site", None)
    assert words_of(KEY, "site") in capsys.readouterr().out
    monkeypatch.setattr(typer, "confirm", lambda _question: False)
    with pytest.raises(EnrolmentError, match="exchanged"):
        require_words(KEY, "site", None)


@pytest.mark.parametrize("slip", ["missing", "mistyped"])
def test_a_slip_of_the_pen_is_told_from_another_key(slip: str) -> None:
    key = VerifyKey(bytes(32))
    words = words_of(key, "site").split()
    typed = words[:3] if slip == "missing" else ["clokc", *words[1:]]
    with pytest.raises(EnrolmentError, match="Type them again") as caught:
        require_words(key, "site", " ".join(typed))
    assert ("'clokc'" in str(caught.value)) == (slip == "mistyped")
    with pytest.raises(EnrolmentError, match="exchanged"):
        require_words(key, "site", " ".join(reversed(words)))
