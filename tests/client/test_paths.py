"""A home that others can write, or put another in the place of, is none to start in."""

import os
from pathlib import Path

import pytest

from client.paths import Home, require_closed_home
from common.errors import StorageError

PARTS = (
    *(".", "policy.toml", "site.toml", "keys", "keys/node.pub", "ledger", "ledger/ledger.jsonl"),
    *("ledger/ledger.head.json", "journal", "journal/journal.jsonl", "journal/journal.head.json", "replies", "logs"),
    *("bundles.txt", "federation.json"),
)


@pytest.mark.parametrize("part", PARTS)
def test_whatever_others_can_write_is_named(tiny_home: Home, part: str) -> None:
    path = tiny_home.folder / part
    if part in ("bundles.txt", "federation.json", "journal/journal.jsonl", "ledger/ledger.jsonl"):
        path.touch(0o644)
    require_closed_home(tiny_home)
    for bits in (0o002, 0o020):
        path.chmod(path.stat().st_mode | bits)
        with pytest.raises(StorageError, match=f"chmod go-w {path}$"):
            require_closed_home(tiny_home)
        path.chmod(path.stat().st_mode & ~bits)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")
@pytest.mark.parametrize("part", [*PARTS[1:], "keys/site.json", "..", "vault"])
def test_whatever_belongs_to_another_is_named(tiny_home: Home, part: str) -> None:
    """Not the folder of the home: where root runs this, to whom that belongs is its user."""
    (vault,) = tiny_home.folder.glob("vault-*")
    path = {"..": tiny_home.folder.parent, "vault": vault}.get(part, tiny_home.folder / part)
    if not path.exists():
        path.touch(0o644)
    require_closed_home(tiny_home)
    os.chown(path, 65534, 65534)
    with pytest.raises(StorageError, match=f"user 65534's.*chown 0 {path}$"):
        require_closed_home(tiny_home)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")
def test_root_may_look_at_the_home_of_an_agents_user(tiny_home: Home) -> None:
    for path in (tiny_home.folder, *tiny_home.folder.rglob("*")):
        os.chown(path, 12345, 12345)
    require_closed_home(tiny_home)
    tiny_home.policy.unlink()
    tiny_home.policy.touch(0o644)  # root's own is fine
    require_closed_home(tiny_home)


def test_a_policy_that_is_a_link_is_followed(tiny_home: Home, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    tiny_home.policy.symlink_to(tiny_home.policy.rename(tmp_path / "open" / "policy.toml"))
    require_closed_home(tiny_home)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(StorageError, match=f"in the place of {tiny_home.policy}. .*chmod o-w {tmp_path / 'open'}$"):
        require_closed_home(tiny_home)


def test_a_training_set_that_others_can_write_is_named(tiny_home: Home) -> None:
    (vault,) = tiny_home.folder.glob("vault-*")
    vault.chmod(0o777)
    with pytest.raises(StorageError, match=f"chmod go-w {vault}$"):
        require_closed_home(tiny_home)


def test_a_home_that_can_be_exchanged_whole_is_refused(tiny_home: Home, tmp_path: Path) -> None:
    """However far above, and where a link leads to it; the sticky bit keeps it, as in /tmp."""
    above, elsewhere = tmp_path / "above", tmp_path / "elsewhere"
    (above / "between").mkdir(parents=True)
    elsewhere.mkdir()
    moved = Home(tiny_home.folder.rename(above / "between" / "home"))
    (elsewhere / "link").symlink_to(moved.folder)
    linked = Home(elsewhere / "link")
    for folder, homes in ((above, (moved, linked)), (above / "between", (moved, linked)), (elsewhere, (linked,))):
        for mode, refused in ((0o777, True), (0o772, True), (0o1777, False), (0o775, False)):
            folder.chmod(mode)
            for home in homes if refused else ():
                with pytest.raises(StorageError, match=f"chmod o-w {folder}$"):
                    require_closed_home(home)
            for home in (moved, linked) if not refused else ():
                require_closed_home(home)


def test_a_home_that_is_not_there_is_told_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("gone", "loop"):
        require_closed_home(Home(tmp_path / name))
