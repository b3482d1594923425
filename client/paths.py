"""Where everything stands in a site's home folder. Paths only, so that the relay can know them without torch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from common.closed import owners_of, require_closed, require_in_place, require_owned
from common.errors import StorageError

INCOMING = ".incoming"
"""Folder of an inbox in which a pull (client/pull) puts what it has not kept yet."""


def require_home(folder: Path) -> None:
    """Refuse a folder that no `init` has made: without its key and its policy it is no site's home.

    Raises:
        StorageError: Neither is there.
    """
    home = Home(folder)
    if not (home.key.exists() or home.policy.exists()):
        raise StorageError(f"Expected a site's home in {folder}. Name the folder that `fedmedgan-site init` made.")


def require_closed_home(home: "Home") -> None:
    """Refuse a home in which others than its owner can write, or in whose place they can put another.

    They could put their own policy, or coordinator, there.

    Raises:
        StorageError: It is open, or everybody can write a folder above it, or a part of it or a folder above is another
            user's.
    """
    folders = (home.folder, home.key.parent, home.ledger, home.journal, home.replies, home.log.parent)
    books = (book / f"{book.name}{end}" for book in (home.ledger, home.journal) for end in (".jsonl", ".head.json"))
    files = (home.policy, home.folder / "site.toml", home.federation, home.bundles, home.node_pub)
    paths, owners = (*folders, *files, *books, *home.folder.glob("vault-*")), owners_of(home.folder)
    require_closed(*paths, owners=owners)
    require_owned(home.key, home.node_key, home.vault_key, owners=owners)
    for path in paths:  # each, since it may be a link
        require_in_place(path, owners)


@final
@dataclass(frozen=True)
class Home:
    """The paths of a site's home folder."""

    folder: Path

    @property
    def policy(self) -> Path:
        """Return the path of the policy."""
        return self.folder / "policy.toml"

    @property
    def key(self) -> Path:
        """Return the path of the identity key."""
        return self.folder / "keys" / "site.json"

    @property
    def ledger(self) -> Path:
        """Return the folder of the ledger."""
        return self.folder / "ledger"

    @property
    def journal(self) -> Path:
        """Return the folder of the journal."""
        return self.folder / "journal"

    @property
    def replies(self) -> Path:
        """Return the folder of the stored replies."""
        return self.folder / "replies"

    @property
    def log(self) -> Path:
        """Return the path of the site's own log: reasons in full, never sent anywhere."""
        return self.folder / "logs" / "agent.log"

    @property
    def node_key(self) -> Path:
        """Return the path of the key by which Flower's link knows this site: EC P-384, OpenSSH, mode 0600."""
        return self.folder / "keys" / "node.key"

    @property
    def node_pub(self) -> Path:
        """Return the path of the node key's public half."""
        return self.folder / "keys" / "node.pub"

    @property
    def next_key(self) -> Path:
        """Return the path of the node key that waits for the coordinator."""
        return self.folder / "keys" / "next.key"

    @property
    def federation(self) -> Path:
        """Return the path of the pinned invitation: whom this site talks to."""
        return self.folder / "federation.json"

    @property
    def socket(self) -> Path:
        """Return the path of the Unix socket between agent and relay."""
        return self.folder / "agent.sock"

    @property
    def bundles(self) -> Path:
        """Return the path of the optional list of bundles (SHA-256, one a line) whose runs the relay serves."""
        return self.folder / "bundles.txt"

    @property
    def relay_log(self) -> Path:
        """Return the path of the relay's log."""
        return self.folder / "logs" / "relay.log"

    @property
    def relay_state(self) -> Path:
        """Return the path of what the relay says of itself, for `status`."""
        return self.folder / "logs" / "relay.json"

    @property
    def start_log(self) -> Path:
        """Return the path of the log of `start`."""
        return self.folder / "logs" / "start.log"

    @property
    def start_state(self) -> Path:
        """Return the path of what `start` says of its two children, for `status`."""
        return self.folder / "logs" / "start.json"

    @property
    def start_lock(self) -> Path:
        """Return the path of the lock that `start` holds."""
        return self.folder / "logs" / "start.lock"

    @property
    def serve_lock(self) -> Path:
        """Return the path of the lock that every agent of this home holds while it serves."""
        return self.folder / "logs" / "serve.lock"

    @property
    def relay_lock(self) -> Path:
        """Return the path of the lock that a relay holds."""
        return self.folder / "logs" / "relay.lock"

    @property
    def vault_key(self) -> Path:
        """Return the path of the key that seals imported images."""
        return self.folder / "keys" / "vault.json"

    def vault(self, classes: Sequence[str], size: int, channels: int = 1) -> Path:
        """Return the folder of the imported training set for these classes, this size and these channels."""
        form = [list(classes), size] if channels == 1 else [list(classes), size, channels]
        name = hashlib.sha256(json.dumps(form).encode()).hexdigest()[:16]
        return self.folder / f"vault-{name}"
