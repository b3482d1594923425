"""Whom a home is closed to: who can write its files, or put others in their place. Out of scope: what is in them."""

import os
import stat
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path

from common.errors import StorageError

MAX_LINKS = 40
"""Links on the way to one path; the system itself follows no more."""

Owners = AbstractSet[int]
"""Numbers of the users to whom a file may belong."""


def owners_of(home: Path) -> Owners:
    """Return who may own a home, what it names and the folders above: root and the user of this process.

    Where root runs it, as `doctor` of an agent's home, that is also the user to whom the home belongs.
    """
    user = os.geteuid()
    try:
        return {0, user or home.stat().st_uid}
    except OSError:  # told where the home is opened
        return {0, user}


def require_closed(*paths: Path, owners: Owners) -> None:
    """Refuse files and folders that others than their owner can write; to be read by a group is fine.

    Raises:
        StorageError: One of them is open or another user's; those that are not there are not looked at.
    """
    for path in paths:
        try:
            status = path.stat()
        except OSError:  # not there, or not to be seen: told where it is read
            continue
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o022:
            raise StorageError(
                f"Expected {path} to be written by its owner alone, its mode is {mode:03o}: others can change what it "
                f"says. Look whether somebody has, then run: chmod go-w {path}"
            )
        _require_owned(path, status, owners, "change what it says")


def require_owned(*paths: Path, owners: Owners) -> None:
    """Refuse files of other users; who opens them looks at their modes.

    Raises:
        StorageError: One of them is another user's; those that are not there are not looked at.
    """
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        _require_owned(path, status, owners, "change what it says")


def require_in_place(path: Path, owners: Owners) -> None:
    """Refuse a path in whose place others can put another, at any step of the way to it, links of links included.

    A folder on that way is open to everybody and not sticky, as /tmp is, or a folder or a link is another user's. A
    folder that a group may write is let pass: on many systems a user's own group may write whatever he makes.

    Raises:
        StorageError: There is one; those that cannot be looked at are left to who opens the path.
    """
    for step, status in _way(path):
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o002 and not mode & stat.S_ISVTX and not stat.S_ISLNK(status.st_mode):
            raise StorageError(
                f"Expected {step} not to be written by everybody, its mode is {mode:03o}: others can put something "
                f"else in the place of {path}. Look whether somebody has, then run: chmod o-w {step}"
            )
        _require_owned(step, status, owners, f"put something else in the place of {path}")


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield each folder above a path and each link, in the order in which the system passes them."""
    rest, here, links = [*reversed(path.absolute().parts)], Path("/"), 0
    while rest and links <= MAX_LINKS:
        part = rest.pop()
        here = here.parent if part == ".." else here / part
        try:
            status = here.lstat()
            target = here.readlink() if stat.S_ISLNK(status.st_mode) else None
        except OSError:
            continue
        if target is not None:
            yield here, status
            rest, here, links = [*rest, *reversed(target.parts)], here.parent, links + 1
        elif rest:
            yield here, status


def _require_owned(path: Path, status: os.stat_result, owners: Owners, what: str) -> None:
    if status.st_uid in owners:
        return
    change = "chown -h" if stat.S_ISLNK(status.st_mode) else "chown"
    raise StorageError(
        f"Expected {path} to belong to user {' or '.join(map(str, sorted(owners)))}, it is user {status.st_uid}'s, "
        f"who can {what}. Look whether that has happened, then run: {change} {max(owners)} {path}"
    )
