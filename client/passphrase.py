"""Where the passphrase of a site's identity key comes from, and the command that sets, changes or removes it.

A service gets it as the credential `passphrase` of its service manager ($CREDENTIALS_DIRECTORY/passphrase, a file of
mode 0600); `start` hands it to its agent through a pipe; else a person is asked, once, on a terminal. It is never an
argument, never in an environment, never in a log. Part of the relay's side too: no torch and no patient code.
Out of scope: how a key is kept under it (common/passphrase).
"""

import getpass
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from client.paths import Home, require_home
from common.crypto import SigningKey, is_sealed, load_key, save_key
from common.errors import PassphraseError, StorageError
from common.files import read_credential
from common.lock import is_held
from common.passphrase import MAX_PASSPHRASE_BYTES, Passphrase

CREDENTIAL = "passphrase"
_LIMIT = MAX_PASSPHRASE_BYTES + 2  # and the end of a line


def obtain(descriptor: int | None = None) -> Passphrase:
    """Return the passphrase of the identity key: from the supervisor, else the credential, else as typed on a terminal.

    Args:
        descriptor: Of the pipe into which the supervisor wrote it; closed here.

    Raises:
        PassphraseError: There is none, or what is there is no passphrase.
        StorageError: Others than its owner may read the credential.
        WireError: The credential is too long.

    Guarantees:
        - nobody_is_kept_waiting: Without a terminal nothing is asked.
    """
    if descriptor is not None:
        return _from_pipe(descriptor)
    handed = read_credential(CREDENTIAL, _LIMIT)
    if handed is not None:
        return Passphrase.from_bytes(handed)
    if not sys.stdin.isatty():
        raise PassphraseError(
            "The identity key is kept under a passphrase, and there is no terminal to ask for it. Under systemd "
            f"hand it over: LoadCredentialEncrypted={CREDENTIAL}:FILE. Elsewhere set CREDENTIALS_DIRECTORY to a folder "
            f"that holds it as the file `{CREDENTIAL}`, mode 600."
        )
    return _asked("Passphrase of this site's identity key: ")


def ask_new() -> Passphrase:
    """Ask twice on a terminal for a new passphrase.

    Raises:
        PassphraseError: There is no terminal, the two differ, or it is too short.
    """
    if not sys.stdin.isatty():
        raise PassphraseError("A new passphrase is typed on a terminal, and there is none. Nothing was changed.")
    new = _asked("New passphrase of this site's identity key: ")
    new.require_strength()
    if _asked("The same again: ") != new:
        raise PassphraseError("The two differ. Nothing was changed.")
    return new


def load_identity(home: Home) -> SigningKey:
    """Read a site's identity key, with its passphrase where it has one; raises as `load_key` and `obtain`."""
    return load_key(home.key, obtain)


def change(
    home: Annotated[Path, typer.Argument(help="The site's home folder.")],
    remove: Annotated[bool, typer.Option("--remove", help="Keep the key without a passphrase.")] = False,
) -> None:
    """Set, change or remove the passphrase of the site's identity key. The key itself stays.

    What is copied already, in a backup say, stays as it was. Nothing is changed while an agent or `start` runs: after a
    crash it would be started anew with the passphrase from before.
    """
    require_home(home)
    opened = Home(home)
    if is_held(opened.start_lock) or is_held(opened.serve_lock, shared=True):
        raise StorageError(
            f"The agent of {home} runs; started anew after a crash it could not open its key. Stop it first: Ctrl-C "
            "at `start`, or systemctl stop fedmedgan-agent. Then run `passphrase` again, hand a service the new one as "
            "its credential, and start it."
        )
    had, key = is_sealed(opened.key), load_identity(opened)
    if remove and not had:
        print("the identity key has no passphrase; nothing was changed")
        return
    save_key(opened.key, key, None if remove else ask_new())
    print(f"passphrase {'removed' if remove else 'changed' if had else 'set'}: {opened.key}")
    if not remove:
        print("lost, the identity is lost with it: the ledger and this site's membership cannot be continued")
        print("as a service: hand it over as the credential `passphrase` (docs/hospital.md); `start` asks for it")


def _from_pipe(descriptor: int) -> Passphrase:
    try:
        with os.fdopen(descriptor, "rb") as pipe:
            return Passphrase.from_bytes(pipe.read(_LIMIT))
    except OSError as error:
        raise PassphraseError(f"Could not read a passphrase from descriptor {descriptor}: {error.strerror}.") from error


def _asked(prompt: str) -> Passphrase:
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return Passphrase(getpass.getpass(prompt))
        except getpass.GetPassWarning:
            pass  # said below
    raise PassphraseError("This terminal cannot hide what is typed. Use another one.")
