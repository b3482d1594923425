"""What a relay says of itself: kept over an end, and never a reason to end."""

import json
from pathlib import Path

import pytest

from client import relay_state
from client.relay_state import MAX_STATE_BYTES, STOPPED, State, node_before, why_ended
from common.errors import StorageError


def test_the_node_and_the_end_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "relay.json"
    assert node_before(path) == 0
    state = State(path, node_id=7)
    state.note(message=True)
    state.end(STOPPED)
    said = json.loads(path.read_text())
    assert (node_before(path), said["ended"], said["messages"]) == (7, STOPPED, 1)
    State(path, node_id=7).note()
    assert "ended" not in json.loads(path.read_text())


DEEP = [f'{{"node": {"[" * depth}{"]" * depth}}}' for depth in (20_000, *range(900, 1000, 5))]
ENDLESS = '{"node": 7, "ended": "' + "x" * MAX_STATE_BYTES + '"}'


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"node": -1}', '{"node": "7"}', '{"node": 1e400}', "[" * 20_000, ENDLESS, *DEEP]
)
def test_a_damaged_file_names_no_node(tmp_path: Path, text: str) -> None:
    path = tmp_path / "relay.json"
    path.write_text(text)
    assert node_before(path) == 0
    State(path, node_id=7).end("refused")  # nor does it keep a relay from saying why it ends
    assert why_ended(path) == "refused"


def test_a_folder_or_a_file_that_is_no_text_names_no_node(tmp_path: Path) -> None:
    (tmp_path / "relay.json").write_bytes(b"\xff\xfe")
    (tmp_path / "folder").mkdir()
    for name in ("relay.json", "folder"):
        assert (node_before(tmp_path / name), why_ended(tmp_path / name)) == (0, "")


def test_disk_may_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("No space left on device")

    monkeypatch.setattr(relay_state, "write_atomic", full)
    state = State(tmp_path / "relay.json")
    state.note(message=True)
    state.end(STOPPED)
    assert state.messages == 1
