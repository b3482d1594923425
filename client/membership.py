"""The commands by which a site joins a federation, renews its node key and leaves: `enrol`, `join`, `renew`, `leave`.

None needs a server. Out of scope: what they write (client/joining).
"""

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from client import policy
from client.home import Home
from client.joining import enrolment_file, has_joined, load_pinned, make_next_key, read_for
from client.joining import join as pin
from client.joining import leave as forget
from client.passphrase import load_identity
from client.paths import require_home
from common.crypto import load_verify_key
from common.enrolment import MAX_DOCUMENT_BYTES, Invitation
from common.errors import ConfigError, StorageError
from common.files import read_bounded, require_outside, write_atomic
from common.fingerprint import require_words, words_of
from common.lock import is_held

HomeArgument = Annotated[Path, typer.Argument(help="The site's home folder.")]
OutOption = Annotated[
    Path | None, typer.Option(help="The file to write; by default NAME.enrolment.json in the current folder.")
]


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `fedmedgan-site`."""
    for command in (enrol, join, renew, leave):
        app.command()(command)


def enrol(home: HomeArgument, out: OutOption = None) -> None:
    """Write the file that tells the coordinator this site's public keys; send it by any way."""
    _write_enrolment(home, out)


def join(
    home: HomeArgument,
    invitation: Annotated[Path, typer.Argument(help="The file that the coordinator sent back.")],
    words: Annotated[
        str | None, typer.Option(help="The coordinator's words, as read by phone; without, they are shown and asked.")
    ] = None,
) -> None:
    """Accept the coordinator's invitation, once its words are compared by phone."""
    require_home(home)
    opened, content = Home(home), read_bounded(invitation, MAX_DOCUMENT_BYTES)
    identity = load_verify_key(opened.key)
    read = read_for(home, content, policy.load(opened.policy).site, identity, datetime.now(UTC))
    if not has_joined(home):
        print(f"words of this site, to read to the coordinator: {words_of(identity, 'site')}")
        require_words(read.verify_key, "coordinator", words)
    pin(home, content)
    named = shlex.quote(str(home))
    if opened.next_key.exists():
        print(f"the invitation is for the old node key, under which {read.site} goes on: the renewal is still open")
        print(f"next: send the coordinator what `fedmedgan-site enrol {named}` writes, and `join` with what comes back")
        return
    print(f"joined {read.federation} at {read.host}, port {read.port}, as {read.site}")
    _print_roster(read)
    if is_held(opened.start_lock):
        print("next: nothing; `start` runs, and its relay takes this up by itself within a minute")
        return
    print(f"next: fedmedgan-site import {named}, if the images are not there; then fedmedgan-site start {named}")


def renew(home: HomeArgument, out: OutOption = None) -> None:
    """Make a new node key, to be used once the coordinator's new invitation is joined; the old one serves until then.

    The identity stays: it signs the ledger and the journal.
    """
    require_home(home)
    make_next_key(home)
    _write_enrolment(home, out)
    print(
        "do this between two runs: the old key stops being let in as soon as the coordinator has enrolled the new one"
    )


def leave(
    home: HomeArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Leave the federation: destroy the node key and forget the coordinator. Ledger, journal and identity stay."""
    require_home(home)
    pinned, opened = load_pinned(home), Home(home)
    if is_held(opened.start_lock) or is_held(opened.relay_lock) or is_held(opened.serve_lock, shared=True):
        raise StorageError(f"Agent and relay of {home} still run. Stop them first, then run `leave` again.")
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"There is no terminal to ask on. To leave {pinned.federation} without, use --yes.")
        typer.confirm(f"Leave {pinned.federation}? To come back takes a new invitation.", abort=True)
    forget(home)
    print(f"left {pinned.federation}; what was spent of the budget stays spent")
    print(f"next: tell the coordinator, who runs `fedmedgan-coordinator revoke HOME {pinned.site}`")


def _write_enrolment(home: Path, out: Path | None) -> None:
    require_home(home)
    opened = Home(home)
    site, key = policy.load(opened.policy).site, load_identity(opened)
    content = enrolment_file(home, site, key, datetime.now(UTC))
    file = out or Path(f"{site}.enrolment.json")
    require_outside(home, file)
    write_atomic(file, content)
    print(f"{file}: public keys only; send it to the coordinator")
    print(f"words of this site, to read to the coordinator by phone: {words_of(key.verify_key, 'site')}")
    print(f"next: fedmedgan-site join {shlex.quote(str(home))} {site}.invitation.json, with the file that comes back")


def _print_roster(invitation: Invitation) -> None:
    others = [member.site for member in invitation.roster if member.site != invitation.site]
    print(f"the other sites when this was written: {', '.join(others) or 'none'}")
