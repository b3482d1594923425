"""Secrets under a passphrase: what opens, what does not, and that nothing of a passphrase is shown."""

import pytest

from common.errors import PassphraseError, WireError
from common.passphrase import _COST, FIELDS, Passphrase, seal, unseal

WORDS = Passphrase("correct horse battery staple")
ABOUT = {"version": 2, "public": "ab"}


@pytest.fixture(scope="module")
def sealed() -> dict:
    return seal(b"secret" * 5, WORDS, ABOUT)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the memory and the time for each further key."""
    monkeypatch.setitem(_COST, "log2_n", 14)


def test_what_was_sealed_opens_and_is_new_each_time(sealed) -> None:
    again = seal(b"secret" * 5, WORDS, ABOUT)
    assert set(sealed) == FIELDS
    assert all(sealed[name] != again[name] for name in ("salt", "nonce", "sealed"))
    assert unseal(again, WORDS, ABOUT) == unseal(sealed, WORDS, ABOUT) == b"secret" * 5
    assert (sealed["log2_n"], again["log2_n"]) == (17, 14)


def test_another_passphrase_does_not_open(sealed) -> None:
    with pytest.raises(PassphraseError, match="does not open") as caught:
        unseal(sealed, Passphrase("correct horse battery stable"), ABOUT)
    assert "stable" not in str(caught.value)


@pytest.mark.parametrize("name", ["salt", "nonce", "sealed", "about", "p"])
def test_nothing_changed(sealed, name) -> None:
    values, about = dict(sealed), dict(ABOUT)
    if name == "about":
        about["public"] = "ac"
    elif name == "p":
        values["p"] = 2
    else:
        values[name] = ("0" if values[name][0] != "0" else "1") + values[name][1:]
    with pytest.raises(PassphraseError):
        unseal(values, WORDS, about)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("log2_n", 19),
        ("log2_n", 13),
        ("log2_n", 10**9),
        ("log2_n", 17.0),
        ("log2_n", True),
        ("r", 9),
        ("p", 5),
        ("p", 0),
        ("p", "1"),
        ("kdf", "pbkdf2"),
        ("kdf", None),
        ("cipher", "none"),
        ("salt", "00"),
        ("salt", 7),
        ("nonce", "g" * 24),
        ("nonce", "AB" * 12),
        ("sealed", "0"),
        ("sealed", ["00"]),
        ("sealed", "00" * 5000),
    ],
)
def test_bounded_cost(sealed, name, value) -> None:
    """Refused before anything is derived: nothing but the values of `seal`, and no more memory than allowed."""
    with pytest.raises(WireError, match="another way"):
        unseal({**sealed, name: value}, WORDS, ABOUT)


def test_redacted_repr() -> None:
    assert repr(WORDS) == str(WORDS) == f"{WORDS}" == "Passphrase(<redacted>)"
    assert "horse" not in repr({"given": [WORDS]})


def test_one_form() -> None:
    assert Passphrase("Zürich") == Passphrase("Zu\u0308rich")
    assert Passphrase.from_bytes(b"abc\r\n") == Passphrase.from_bytes(b"abc\n") == Passphrase("abc")
    assert Passphrase.from_bytes(b"abc\n\n") != Passphrase("abc")


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"x" * 1025])
def test_what_is_no_passphrase(content) -> None:
    with pytest.raises(PassphraseError) as caught:
        Passphrase.from_bytes(content)
    assert "xxx" not in str(caught.value)


def test_a_new_one_is_long() -> None:
    WORDS.require_strength()
    with pytest.raises(PassphraseError, match="at least 12 characters"):
        Passphrase("elevenchars").require_strength()
