"""What sites declare with their releases is kept, whatever becomes of the round."""

from pathlib import Path

import pytest

from common.config_text import build_config
from common.errors import StorageError
from server import declared
from server.declared import keep_declared, newest_releases, read_declared
from server.records import Failed, Progress, RoundRecord, SiteRelease
from server.results import privacy_card


def _release(spent: float) -> SiteRelease:
    return SiteRelease(100, 1.5, 0.1, 1, spent, 10.0, "ab")


def _record(number: int, **spent: float) -> RoundRecord:
    return RoundRecord(number, {name: _release(one) for name, one in spent.items()}, {}, None, None, 0.0, 1.0, 0)


def _spent(path: Path) -> dict[str, tuple[int, float]]:
    return {name: (one.round, one.epsilon_spent) for name, one in read_declared(path).items()}


def test_a_failed_round_counts(tmp_path: Path) -> None:
    take = keep_declared(tmp_path / "declared.json")
    take(Failed(_record(0, a=5.6), 2, 1, 3))
    assert _spent(tmp_path / "declared.json") == {"a": (0, 5.6)}
    take(Progress(1, 1, 2, "sites", {"b": _release(1.0)}))  # a run that is killed now has it all the same
    take(_record(1, a=5.8, b=1.0))
    assert _spent(tmp_path / "declared.json") == {"a": (1, 5.8), "b": (1, 1.0)}


def test_an_old_answer_is_not_newer(tmp_path: Path) -> None:
    keep_declared(tmp_path / "declared.json")(_record(5, a=3.0))
    before = read_declared(tmp_path / "declared.json")
    resumed = keep_declared(tmp_path / "declared.json")
    resumed(_record(4, a=2.5))
    resumed(_record(5, a=3.0))
    assert read_declared(tmp_path / "declared.json") == before


def test_a_disk_that_does_not_take_it_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("full")

    monkeypatch.setattr(declared, "write_atomic", full)
    keep_declared(tmp_path / "declared.json")(_record(5, a=3.0))
    assert not (tmp_path / "declared.json").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b'{"a": {"round": "x"}}', b"\xff"])
def test_a_file_that_does_not_read_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "declared.json").write_bytes(content)
    assert read_declared(tmp_path / "declared.json") == {}


def test_a_round_that_a_kill_broke_off_counts_in_what_a_run_states(tmp_path: Path) -> None:
    take = keep_declared(tmp_path / "declared.json")
    take(_record(4, a=3.0, b=3.0))
    take(Progress(5, 1, 2, "sites", {"a": _release(3.5)}))
    found = {(record.round, *record.sites) for record in newest_releases(tmp_path / "declared.json")}
    assert found == {(5, "a"), (4, "b")}
    records = [*newest_releases(tmp_path / "declared.json"), _record(4, a=3.0, b=3.0)]
    card = privacy_card(build_config({}, {"image.classes": ("x",)}), records, "")
    assert {name: site["epsilon_spent"] for name, site in card["sites"].items()} == {"a": 3.5, "b": 3.0}
    assert [release["count"] for release in card["sites"]["b"]["releases"]] == [1]
