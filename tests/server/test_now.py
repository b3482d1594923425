"""The note of what a run does."""

from pathlib import Path

from common.config_text import build_config
from server.now import open_note
from server.records import RoundRecord, Waiting

CONFIG = build_config({}, {"image.classes": ("a",)})
ROUND = RoundRecord(0, {}, {}, None, None, 0.1, 1.0, 0)


def test_a_note_goes_with_its_round_and_with_its_run(tmp_path: Path) -> None:
    path = tmp_path / "now.txt"
    waiting = Waiting(1, 2, 2, ("st-john",), 60.0)
    with open_note(CONFIG, path) as note:
        note(waiting)
        assert "st-john" in path.read_text()
        note(ROUND)
        assert not path.exists()
        note(waiting)
    assert not path.exists()


def test_what_cannot_be_written_or_removed_costs_the_note_and_not_the_run(tmp_path: Path) -> None:
    path = tmp_path / "now.txt"
    path.mkdir()
    with open_note(CONFIG, path) as note:
        note(Waiting(1, 2, 2, (), 60.0))
        note(ROUND)
    assert path.is_dir()
