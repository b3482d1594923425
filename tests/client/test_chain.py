"""What a chain remembers of itself in one process: enough to be fast, never enough to overlook a change."""

import os

import pytest

from client.chain import Chain
from common.crypto import SigningKey
from common.errors import StorageError

KEY = SigningKey.from_bytes(bytes(range(32)))


class Counting:
    """A public key that counts what it verifies."""

    def __init__(self):
        self.verified = 0

    def to_bytes(self):
        return KEY.verify_key.to_bytes()

    def verify(self, message, signature, purpose):
        self.verified += 1
        KEY.verify_key.verify(message, signature, purpose)


def written(folder, lines):
    chain = Chain(folder, "book", KEY.verify_key, KEY)
    with chain.locked():
        for number in range(lines):
            chain.append({"said": number})
    return folder / "book.jsonl"


def opened(folder):
    """Open for reading and return what the chain says, and how many signatures were verified for it."""
    counting = Counting()
    return [body["said"] for body in Chain(folder, "book", counting).bodies], counting.verified


def test_incremental_when_opened_anew(tmp_path):
    written(tmp_path, 50)
    assert opened(tmp_path) == (list(range(50)), 1)  # the head's
    writer = Chain(tmp_path, "book", KEY.verify_key, KEY)
    with writer.locked():
        writer.append({"said": 50})
    assert opened(tmp_path) == (list(range(51)), 1)


def test_incremental_only_for_the_same_file_and_key(tmp_path):
    path = written(tmp_path / "a", 5) if (tmp_path / "a").mkdir() is None else None
    (tmp_path / "b").mkdir()
    for name in os.listdir(tmp_path / "a"):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    assert opened(tmp_path / "b") == (list(range(5)), 6)
    with pytest.raises(StorageError):
        Chain(path.parent, "book", SigningKey.generate().verify_key)


def test_incremental_after_lines_that_another_process_wrote(tmp_path):
    path = written(tmp_path, 5)
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    head, lines = files["book.head.json"], files["book.jsonl"]
    written(tmp_path, 3)
    newest = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    path.write_bytes(lines)
    (tmp_path / "book.head.json").write_bytes(head)
    assert opened(tmp_path)[1] == 6  # shorter than what is remembered: all of it again
    for name, content in newest.items():
        (tmp_path / name).write_bytes(content)
    assert opened(tmp_path) == ([0, 1, 2, 3, 4, 0, 1, 2], 4)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 0.8, 0.999])
def test_incremental_yet_any_changed_bit_of_the_past_is_seen(tmp_path, place):
    path = written(tmp_path, 8)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(bytes(content))
    for key in (None, KEY):
        with pytest.raises(StorageError, match="cannot be trusted"):
            Chain(tmp_path, "book", KEY.verify_key, key)


def test_incremental_for_some_chains_and_right_for_all(tmp_path):
    for number in range(40):
        (tmp_path / str(number)).mkdir()
        written(tmp_path / str(number), 3)
    assert [opened(tmp_path / str(number))[0] for number in range(40)] == [[0, 1, 2]] * 40
    assert opened(tmp_path / "39")[1] == 1
    assert opened(tmp_path / "0")[1] == 4  # forgotten, so verified again
