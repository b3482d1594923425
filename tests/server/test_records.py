"""metrics.jsonl: written line by line, read back whole, and what a crash leaves behind."""

from pathlib import Path

import pytest

from common.errors import ResumeError
from server.records import RoundRecord, SiteRelease, append_record, is_landmark, read_records, write_records


def _record(number: int) -> RoundRecord:
    return RoundRecord(
        number, {"a": SiteRelease(100, 1.5, 0.1, 1, 2.0, 10.0, "ab")}, {"b": "policy"}, 0.5, 2, 0.1, 1.0, 64
    )


def test_records_appended_are_those_written_anew(tmp_path: Path) -> None:
    records = [_record(number) for number in range(4)]
    write_records(tmp_path / "whole.jsonl", records)
    write_records(tmp_path / "grown.jsonl", records[:2])
    for record in records[2:]:
        append_record(tmp_path / "grown.jsonl", record)
    assert (tmp_path / "grown.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert read_records(tmp_path / "grown.jsonl") == records


def test_a_line_that_a_crash_cut_is_no_round(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_records(path, [_record(0), _record(1)])
    content = path.read_bytes()
    for cut in (1, 20, 100):
        path.write_bytes(content[:-cut])
        assert [record.round for record in read_records(path)] == [0]
    path.write_bytes(b"{}\n" + content)
    with pytest.raises(ResumeError, match="Line 1"):
        read_records(path)


def test_landmarks_of_a_short_run_are_all_rounds_and_of_a_long_one_few() -> None:
    assert all(is_landmark(number, 39) for number in range(40))
    long = [number for number in range(2001) if is_landmark(number, 2000)]
    assert long[:6] == [0, 1, 2, 4, 8, 16]
    assert long[-1] == 2000
    assert len(long) == 21 + 11  # every hundredth, and 2^0 to 2^10
