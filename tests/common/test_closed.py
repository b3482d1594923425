"""A file that others can change, or put another in the place of, is named with what mends it."""

import os
from pathlib import Path

import pytest

from common.closed import owners_of, require_closed, require_in_place, require_owned
from common.errors import StorageError

OURS = {0, os.geteuid()}
STRANGER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")


def test_an_open_path_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    require_closed(folder, tmp_path / "gone", owners=OURS)
    for mode in (0o700, 0o750, 0o755):
        folder.chmod(mode)
        require_closed(folder, owners=OURS)
    for mode in (0o770, 0o702):
        folder.chmod(mode)
        with pytest.raises(StorageError, match=f"chmod go-w {folder}$"):
            require_closed(folder, owners=OURS)


def test_a_path_that_everybody_can_exchange_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    for mode in (0o755, 0o775, 0o1777):
        folder.chmod(mode)
        require_in_place(folder / "file", OURS)
    folder.chmod(0o757)
    require_in_place(folder, OURS)
    for path in (folder / "file", folder / "gone" / "file"):
        with pytest.raises(StorageError, match=f"mode is 757: .*chmod o-w {folder}$"):
            require_in_place(path, OURS)


@pytest.mark.parametrize("target", ["{here}/open/second", "open/second", "safe/../open/second"])
def test_every_link_of_a_chain_is_walked(tmp_path: Path, target: str) -> None:
    (tmp_path / "safe" / "home").mkdir(parents=True)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "second").symlink_to(tmp_path / "safe")
    (tmp_path / "first").symlink_to(target.format(here=tmp_path))
    for path in (tmp_path / "first", tmp_path / "first" / "home", tmp_path / "safe" / ".." / "first" / "home"):
        (tmp_path / "open").chmod(0o755)
        require_in_place(path, OURS)
        (tmp_path / "open").chmod(0o777)
        with pytest.raises(StorageError, match=f"chmod o-w {tmp_path / 'open'}$"):
            require_in_place(path, OURS)
    require_in_place(tmp_path / "safe" / "home", OURS)


def test_links_without_an_end_are_left_to_who_opens_them(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "deeper").symlink_to("deeper/deeper")
    for name in ("loop", "deeper", "gone"):
        require_in_place(tmp_path / name / "file", OURS)


def test_what_belongs_to_another_is_refused(tmp_path: Path) -> None:
    """Seen as somebody else than whose it is: the mode of what is another's says nothing."""
    (tmp_path / "file").touch(0o600)
    others = {os.geteuid() + 1}
    for check in (require_closed, require_owned):
        with pytest.raises(
            StorageError, match=f"it is user {os.geteuid()}'s.*chown {os.geteuid() + 1} {tmp_path}/file$"
        ):
            check(tmp_path / "file", owners=others)
        check(tmp_path / "file", tmp_path / "gone", owners=OURS)


@as_root
def test_a_folder_or_a_link_of_another_on_the_way_is_refused(tmp_path: Path) -> None:
    above, link = tmp_path / "above", tmp_path / "link"
    (above / "home").mkdir(parents=True)
    link.symlink_to(above)
    require_in_place(link / "home", OURS)
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(StorageError, match=f"user {STRANGER}'s, who can put .*chown -h 0 {link}$"):
        require_in_place(link / "home", OURS)
    require_in_place(above / "home", OURS)
    for mode in (0o755, 0o700, 0o1777):
        above.chmod(mode)
        os.chown(above, STRANGER, STRANGER)
        with pytest.raises(StorageError, match=f"user {STRANGER}'s, who can put .*chown 0 {above}$"):
            require_in_place(above / "home", OURS)


@as_root
def test_who_may_own_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root, who runs this, and for root alone the home's own user: an agent's home is looked at by root too."""
    os.chown(tmp_path, STRANGER, STRANGER)
    assert owners_of(tmp_path) == {0, STRANGER}
    assert owners_of(tmp_path / "gone") == {0}
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert owners_of(tmp_path) == {0, 12345}
