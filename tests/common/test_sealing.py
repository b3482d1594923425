"""Sealed storage and pseudonyms: what opens, and what tells nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StorageError, WireError
from common.sealing import PSEUDONYM_BYTES, SEAL_BYTES, SealingKey, load_sealing_key, save_sealing_key

KEY = SealingKey(bytes(range(32)))


@given(content=st.binary(max_size=200), place=st.binary(max_size=40))
def test_what_was_sealed_opens(content: bytes, place: bytes) -> None:
    sealed = KEY.seal(content, place)
    assert len(sealed) == len(content) + SEAL_BYTES
    assert KEY.open(sealed, place) == content
    assert KEY.seal(content, place) != sealed  # another nonce


@given(content=st.binary(min_size=1, max_size=200), bit=st.integers(0, 10_000))
def test_bound_to_place(content: bytes, bit: int) -> None:
    sealed = bytearray(KEY.seal(content, b"here"))
    for key, place in ((KEY, b"there"), (SealingKey.generate(), b"here")):
        with pytest.raises(WireError):
            key.open(bytes(sealed), place)
    sealed[bit // 8 % len(sealed)] ^= 1 << bit % 8
    for changed in (bytes(sealed), bytes(sealed[: bit % SEAL_BYTES])):
        with pytest.raises(WireError):
            KEY.open(changed, b"here")


def test_one_way() -> None:
    name = KEY.pseudonym(b"17", "patient")
    assert (len(name), name) == (PSEUDONYM_BYTES, KEY.pseudonym(b"17", "patient"))
    assert len({name, KEY.pseudonym(b"17", "file"), KEY.pseudonym(b"18", "patient")}) == 3
    assert name != SealingKey.generate().pseudonym(b"17", "patient")


def test_redacted_repr() -> None:
    assert KEY.to_bytes().hex() not in f"{KEY!r} {KEY}"


def test_saved_and_loaded(tmp_path) -> None:
    save_sealing_key(tmp_path / "key", KEY)
    assert load_sealing_key(tmp_path / "key").to_bytes() == KEY.to_bytes()
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(StorageError):
        load_sealing_key(tmp_path / "key")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": 2, "kind": "sealing", "key": ""}', b"\xff"])
def test_other_files_are_no_keys(tmp_path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(WireError, match="backup"):
        load_sealing_key(path)
