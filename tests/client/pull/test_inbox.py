"""Inbox, state and delivery."""

import json
from pathlib import Path

import pytest

from client.pull.delivery import Delivery, Verdict
from client.pull.inbox import Inbox, load_key
from client.pull.sources import Bounds
from client.pull.state import Count, State
from common.errors import ConfigError, StorageError
from tests.client.pull.test_identifiers import HEAD, META, element

UID = "1.2.826.0.1.42"
ROOMY = Bounds(free_bytes=0)


def inbox_of(folder: Path, bounds: Bounds = ROOMY) -> Inbox:
    return Inbox(folder / "inbox", b"k" * 32, bounds)


def part_of(inbox: Inbox, study: str = "1.2", series: str = "1.3", instance: str = UID) -> Path:
    part = inbox.new_part()
    uids = ((0x00080018, instance), (0x0020000D, study), (0x0020000E, series))
    part.write_bytes(HEAD + META + b"".join(element(tag, b"UI", uid.encode()) for tag, uid in uids))
    return part


def files(inbox: Inbox) -> list[Path]:
    return [path for path in inbox._folder.rglob("*") if path.is_file()]


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = inbox_of(tmp_path)
    part = part_of(inbox)
    content = part.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StorageError, match="No space left") as caught:
            inbox.keep(part, UID)
    assert caught.value.__cause__ is None
    assert files(inbox) == []
    part.write_bytes(content)
    inbox.keep(part, UID)
    assert [path.read_bytes() for path in files(inbox)] == [content]


def test_group_reads_only_where_the_inbox_is_opened_to_it(tmp_path: Path) -> None:
    inbox = inbox_of(tmp_path)
    inbox.keep(part_of(inbox), UID)
    kept = files(inbox)[0]
    modes = [oct(path.stat().st_mode & 0o7777) for path in (kept, kept.parent, tmp_path / "inbox")]
    assert [mode[-3:] for mode in modes] == ["640", "750", "700"]
    (tmp_path / "inbox").chmod(0o750)
    assert (inbox_of(tmp_path).incoming.parent.stat().st_mode & 0o777) == 0o750  # left as it was set


def test_nothing_twice(tmp_path: Path) -> None:
    inbox = inbox_of(tmp_path)
    inbox.keep(part_of(inbox), UID)
    first = files(inbox)[0].stat()
    inbox.keep(part_of(inbox), UID)
    assert [path.stat().st_ino for path in files(inbox)] == [first.st_ino]
    assert inbox.files == 1


def test_another_inbox_is_told_from_this_one(tmp_path: Path) -> None:
    one, other = inbox_of(tmp_path), inbox_of(tmp_path / "other")
    again = inbox_of(tmp_path)
    assert one.identity == again.identity != other.identity
    assert one.series_name(UID) == again.series_name(UID) != other.series_name(UID)
    assert one.series_name(UID) != Inbox(tmp_path / "inbox", b"o" * 32, ROOMY).series_name(UID)
    assert UID not in one.series_name(UID)


def test_no_identifier_in_names(tmp_path: Path) -> None:
    name = str(inbox_of(tmp_path).path(UID).relative_to(tmp_path))
    assert UID not in name
    assert Inbox(tmp_path / "inbox", b"o" * 32, ROOMY).path(UID) != inbox_of(tmp_path).path(UID)


def test_bounds(tmp_path: Path) -> None:
    for bounds, error in (
        (Bounds(free_bytes=0, max_files=1), ConfigError), (Bounds(free_bytes=0, max_bytes=100), ConfigError),
        (Bounds(free_bytes=1 << 60), StorageError),
    ):  # fmt: skip
        inbox = inbox_of(tmp_path / str(bounds.free_bytes + bounds.max_files), bounds)
        inbox.keep(part_of(inbox), UID)
        with pytest.raises(error):
            inbox.require_room()


def test_sweep_and_key(tmp_path: Path) -> None:
    inbox = inbox_of(tmp_path)
    part_of(inbox)
    inbox.sweep()
    assert files(inbox) == []
    key = load_key(tmp_path / "keys" / "inbox.key")
    assert load_key(tmp_path / "keys" / "inbox.key") == key
    assert len(set(key)) > 8
    (tmp_path / "keys" / "inbox.key").write_bytes(b"short")
    with pytest.raises(StorageError):
        load_key(tmp_path / "keys" / "inbox.key")


def test_sweep_leaves_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows whose they are: not even an empty one, nor what stands in another, nor where a link leads."""
    inbox = inbox_of(tmp_path)
    for name in ("empty", "full"):
        (inbox.incoming / name).mkdir()
    (inbox.incoming / "full" / "file").touch()
    (inbox.incoming / "link").symlink_to(tmp_path)
    part_of(inbox)
    inbox.sweep()
    left = {path.name for path in inbox.incoming.rglob("*")}
    assert left - {inbox.identity} == {"empty", "file", "full"}
    part_of(inbox)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    with pytest.raises(StorageError, match="Operation not permitted"):
        inbox.sweep()


def test_only_what_was_asked(tmp_path: Path) -> None:
    inbox = inbox_of(tmp_path)
    delivery = Delivery(inbox, "1.2", "1.3", [UID])
    assert delivery.take(part_of(inbox, study="1.9"), UID) is Verdict.NOT_ASKED
    assert delivery.take(part_of(inbox, series="1.9"), UID) is Verdict.NOT_ASKED
    assert delivery.take(part_of(inbox, instance="1.9"), UID) is Verdict.NOT_ASKED
    assert delivery.take(part_of(inbox), "1.9") is Verdict.NOT_ASKED
    junk = inbox.new_part()
    junk.write_bytes(b"<html>")
    assert delivery.take(junk, UID) is Verdict.NOT_DICOM
    assert files(inbox) == []
    assert delivery.missing == {UID}
    assert delivery.take(part_of(inbox), UID) is Verdict.KEPT
    assert delivery.missing == frozenset()


def test_stops_at_the_bounds(tmp_path: Path) -> None:
    inbox = inbox_of(tmp_path, Bounds(free_bytes=0, max_files=1))
    delivery = Delivery(inbox, "1.2", "1.3", [UID, "1.5", "1.6"])
    assert delivery.take(part_of(inbox), UID) is Verdict.KEPT
    assert delivery.take(part_of(inbox, instance="1.5"), "1.5") is Verdict.STOPPED
    assert isinstance(delivery.stopped, ConfigError)
    assert delivery.take(part_of(inbox, instance="1.6"), "1.6") is Verdict.STOPPED
    assert len(files(inbox)) == 1


def test_state_remembers_whole_series(tmp_path: Path) -> None:
    path = tmp_path / "pull" / "a.json"
    state = State(path)
    state.put("s1", Count(expected=3, received=3))
    state.put("s2", Count(expected=3, received=2))
    state.save()
    again = State(path)
    assert again.is_whole("s1", 3)
    assert not again.is_whole("s1", 4)  # it has grown
    assert not again.is_whole("s2", 3)
    assert not again.is_whole("s3", 3)
    assert path.stat().st_mode & 0o777 == 0o600


def test_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    state = State(path)
    state.put("s1", Count(expected=1, received=1))
    state.save()
    before = path.read_bytes()
    state.put("s2", Count(expected=1, received=1))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError):
        state.save()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["", "[", "[]", '{"version": 1}', '{"version": 2, "series": {}}', '{"version": 1, "series": {}, "more": 1}',
     '{"version": 1, "series": {"a": {"expected": -1}}}', "[" * 100_000],
)  # fmt: skip
def test_damaged_state_is_said(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(StorageError, match=r"remove the file|Remove it"):
        State(tmp_path / "a.json")


def test_state_of_another_release_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": 2, "series": {}}))
    with pytest.raises(StorageError, match="Expected version 1"):
        State(tmp_path / "a.json")
