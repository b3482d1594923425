"""A site's membership in a federation: the node key, what is pinned of the coordinator, and how both are replaced.

    keys/node.key    the private key by which Flower knows this site's node, mode 0600
    keys/node.pub    its public half
    keys/next.key    the key that takes its place once the coordinator has enrolled it
    federation.json  the invitation that was accepted: address, certificate authority, coordinator's key

Part of the relay's side too: no torch and no patient code. Out of scope: the two files that travel (common/enrolment).
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import final

from client.paths import Home
from common.crypto import SigningKey, VerifyKey
from common.enrolment import (
    MAX_DOCUMENT_BYTES,
    Enrolment,
    Invitation,
    read_invitation,
    require_current,
    write_enrolment,
)
from common.errors import EnrolmentError, StorageError, WireError
from common.files import make_folder, read_bounded, read_credential, read_secret, sync_folder, write_atomic
from common.node_keys import NodeKey, load_node_key, new_node_key, node_public_key

MAX_NODE_KEY_FILE_BYTES = 4096


@final
@dataclass(frozen=True)
class Pinned:
    """What a site holds fast of its federation."""

    host: str
    port: int
    ca_pem: bytes
    """Certificate of the one certificate authority that the relay trusts."""
    coordinator: VerifyKey
    site: str
    federation: str
    node_key: str
    """Public half of the node key that the coordinator has enrolled."""


def make_node_key(home: Path) -> None:
    """Make the node's key pair where there is none; one that stands there is kept.

    Raises:
        StorageError: The folder cannot be written, or the key that stands there is none.
    """
    member = Home(home)
    make_folder(member.node_key.parent, 0o700)
    if not member.node_key.exists():
        write_atomic(member.node_key, new_node_key(), 0o600)
    _write_public(member)


def enrolment_file(home: Path, site: str, key: SigningKey, now: datetime) -> bytes:
    """Return the file that tells the coordinator this site's public keys.

    Args:
        home: The site's home folder. A node key is made where there is none.
        site: The site's name, from its policy.
        key: The site's identity, which signs the file.
        now: When the file is made.

    Raises:
        StorageError: A key cannot be read or written.

    Guarantees:
        - public_only: The file holds the name, public keys and a time; no private key and nothing of a patient.
    """
    member = Home(home)
    if member.next_key.exists():
        node_key = _public(member.next_key)
    else:
        make_node_key(home)
        node_key = _public(member.node_key)
    identity = key.verify_key.to_bytes().hex()
    return write_enrolment(Enrolment(created=now, site=site, identity=identity, node_key=node_key), key)


def make_next_key(home: Path) -> None:
    """Make a new node key that waits until the coordinator has enrolled it; one that waits already is kept.

    Raises:
        EnrolmentError: The site has not joined: there is nothing to renew.
        StorageError: The key cannot be written.
    """
    load_pinned(home)
    member = Home(home)
    if not member.next_key.exists():
        write_atomic(member.next_key, new_node_key(), 0o600)


def read_for(home: Path, content: bytes, site: str, identity: VerifyKey, now: datetime) -> Invitation:
    """Read an invitation and refuse it unless this site may accept it now; nothing is written.

    Args:
        home: The site's home folder.
        content: The file, as it came.
        site: This site's name, from its policy.
        identity: This site's public key.
        now: The time.

    Raises:
        WireError: It is no invitation, or of another version.
        EnrolmentError: It is changed, expired, replayed, of another federation, or for another site or node key.

    Guarantees:
        - for_this_site_alone: The invitation names this site, its identity and a node key whose private half is here.
        - never_older: Once joined, only the pinned coordinator's invitations are read, and none older than the pinned.
    """
    invitation = read_invitation(content)
    if invitation.site != site or invitation.identity != identity.to_bytes().hex():
        raise EnrolmentError(
            f"The invitation is for {invitation.site} ({invitation.identity[:16]}), this site is {site} "
            f"({identity.to_bytes().hex()[:16]}). Ask the coordinator for this site's own."
        )
    require_current(invitation, now)
    if Home(home).federation.exists():
        _require_successor(_read_pinned(home), invitation)
    _held_key(Home(home), invitation)
    return invitation


def join(home: Path, content: bytes) -> None:
    """Pin an invitation that `read_for` has let pass and a person has compared.

    Raises:
        EnrolmentError: The private half of its node key is not here.
        StorageError: A file cannot be written.

    Guarantees:
        - any_line: After a crash at any line the same call completes it, and the site is joined as before until then.
    """
    member, invitation = Home(home), read_invitation(content)
    if _held_key(member, invitation) == member.next_key:
        try:
            member.next_key.replace(member.node_key)
            sync_folder(member.node_key.parent)
        except OSError as error:
            raise StorageError(f"Could not put the new node key in its place: {error.strerror}. Join again.") from error
    _write_public(member)
    write_atomic(member.federation, content, 0o600)


def leave(home: Path) -> Pinned:
    """Forget the federation and destroy the node keys; identity, ledger and journal stay.

    Returns:
        What was pinned.

    Raises:
        EnrolmentError: The site has not joined.
        StorageError: A file cannot be deleted.

    Guarantees:
        - no_way_back: An invitation from before is refused afterwards, since its node key is gone.
    """
    pinned, member = load_pinned(home), Home(home)
    try:
        for path in (member.next_key, member.node_key, member.node_pub, member.federation):
            path.unlink(missing_ok=True)
        sync_folder(member.node_key.parent)
        sync_folder(home)
    except OSError as error:
        raise StorageError(f"Could not delete a file of the membership: {error.strerror}. Leave again.") from error
    return pinned


def read_node_key(home: Path) -> NodeKey:
    """Return the key by which Flower's link knows this site: the credential `node.key`, or the home's.

    Raises:
        StorageError: It cannot be read, is none, or others than its owner may read it.
    """
    handed = read_credential(Home(home).node_key.name, MAX_NODE_KEY_FILE_BYTES)
    return load_node_key(handed or read_secret(Home(home).node_key, MAX_NODE_KEY_FILE_BYTES))


def public_node_key(home: Path) -> str:
    """Return the public half of the node key, as an invitation names it; raises as `read_node_key`."""
    return _public(Home(home).node_key)


def has_joined(home: Path) -> bool:
    """Tell whether a site has pinned a federation; a damaged pin counts, and `load_pinned` says so."""
    return Home(home).federation.exists()


def load_pinned(home: Path) -> Pinned:
    """Return what the site pinned when it joined; an invitation's expiry no longer matters then.

    Args:
        home: The site's home folder. A service may have been handed federation.json as a credential instead.

    Raises:
        EnrolmentError: The site has not joined.
        StorageError: federation.json cannot be read or was changed.
    """
    handed = read_credential(Home(home).federation.name, MAX_DOCUMENT_BYTES)
    invitation = _read_pinned(home) if handed is None else read_invitation(handed)
    return Pinned(
        host=invitation.host,
        port=invitation.port,
        ca_pem=invitation.authority.encode(),
        coordinator=invitation.verify_key,
        site=invitation.site,
        federation=invitation.federation,
        node_key=invitation.node_key,
    )


def _read_pinned(home: Path) -> Invitation:
    path = Home(home).federation
    if not path.exists():
        raise EnrolmentError(
            f"This site has joined no federation. Send the coordinator what `fedmedgan-site enrol {home}` writes, then "
            f"run `fedmedgan-site join {home} INVITATION` with the file that comes back."
        )
    try:
        return read_invitation(read_bounded(path, MAX_DOCUMENT_BYTES))
    except (WireError, EnrolmentError) as error:
        raise StorageError(
            f"{path} is not the invitation that was accepted: {error} Restore it from a backup, or delete it and join "
            "again, words compared."
        ) from error


def _require_successor(pinned: Invitation, invitation: Invitation) -> None:
    if invitation.coordinator != pinned.coordinator:
        raise EnrolmentError(
            f"The invitation to {invitation.federation} is signed by another coordinator than that of "
            f"{pinned.federation}, which this site has joined. Ask the coordinator by phone; to change the federation, "
            "run `fedmedgan-site leave` first."
        )
    if invitation.created < pinned.created:
        raise EnrolmentError(
            f"The invitation was made at {invitation.created:%Y-%m-%d %H:%M} UTC, before the one that this site has "
            f"accepted ({pinned.created:%Y-%m-%d %H:%M}): an old file again. Ask for a new one."
        )


def _held_key(member: Home, invitation: Invitation) -> Path:
    """Return which of this site's private keys the invitation is for."""
    for path in (member.node_key, member.next_key):
        if path.exists() and _public(path) == invitation.node_key:
            return path
    raise EnrolmentError(
        "The invitation is for a node key that this site no longer has: an old file, or the key was made anew since. "
        "Send the coordinator what `fedmedgan-site enrol` writes now, and join with the file that comes back."
    )


def _public(path: Path) -> str:
    return node_public_key(read_secret(path, MAX_NODE_KEY_FILE_BYTES)).decode()


def _write_public(member: Home) -> None:
    write_atomic(member.node_pub, (_public(member.node_key) + "\n").encode())
