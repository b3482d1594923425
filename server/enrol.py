"""Make a coordinator's home, enrol and revoke sites, renew certificates. All on files: no server needs to run.

Out of scope: the layout of the home (server/consortium), the files that travel (common/enrolment).
"""

import json
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import final

from common.certificates import Validity, authority_certificate, new_key, read_authority, server_certificate, validity
from common.crypto import SigningKey, load_key, save_key
from common.enrolment import (
    INVITATION_DAYS,
    MAX_ROSTER,
    Enrolment,
    Invitation,
    Member,
    read_enrolment,
    write_invitation,
)
from common.errors import EnrolmentError, StorageError
from common.files import make_folder, make_own_folder, read_bounded, read_secret, write_atomic
from server.consortium import (
    MAX_RECORD_BYTES,
    MAX_SECRET_BYTES,
    Consortium,
    FederationConfig,
    SiteRecord,
    read_settings,
    records,
    require_site,
)

SECRET_BYTES = 32


@final
@dataclass(frozen=True)
class Candidate:
    """A site whose file was read and may be enrolled, if a person finds its words right."""

    enrolment: Enrolment
    known: bool
    """The same identity is enrolled already: nothing is to be compared again."""
    same_key: bool = False
    """So is its node key: nothing changes but the invitation, which is written again."""


def create_consortium(folder: Path, settings: FederationConfig, now: datetime) -> Consortium:
    """Make a coordinator's home: keys, certificates, secrets.

    federation.toml is written last: a home without one was never used, and is taken up where it was left.

    Raises:
        StorageError: The folder cannot be written, or a home stands there already.

    Guarantees:
        - secrets_of_its_owner: Every secret has mode 0600, in folders of mode 0700.
    """
    consortium = Consortium(make_own_folder(folder))
    if consortium.settings.exists():
        raise StorageError(f"A coordinator's home stands in {folder} already. Choose another folder.")
    for part in (consortium.key.parent, consortium.sites, consortium.logs, consortium.runs):
        make_folder(part, 0o700)
    if not consortium.key.exists():
        save_key(consortium.key, SigningKey.generate())
    for path in (consortium.control_token, consortium.superexec_secret):
        write_atomic(path, secrets.token_hex(SECRET_BYTES).encode(), 0o600)
    _make_certificates(consortium, settings, now)
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.model_dump().items()]
    write_atomic(consortium.settings, ("\n".join(lines) + "\n").encode())
    return consortium


def read_candidate(consortium: Consortium, content: bytes, now: datetime, readmit: bool = False) -> Candidate:
    """Read a site's file and refuse it unless it may be enrolled now; nothing is written.

    Args:
        consortium: The coordinator's home.
        content: The file, as it came.
        now: The time.
        readmit: A revoked name may come back, with whatever keys.

    Raises:
        WireError: It is no enrolment, or of another version.
        EnrolmentError: It is changed, expired or replayed, or its name or a key of it is another site's.

    Guarantees:
        - one_name_one_key: No two sites share a name (upper and lower case alike), an identity or a node key.
        - never_older: A file older than the one enrolled is refused, and the file of a revoked site for good.
    """
    enrolment = read_enrolment(content, now)
    known = records(consortium)
    own = known.get(enrolment.site)
    _require_own(enrolment, [record for name, record in known.items() if name != enrolment.site])
    if own is None:
        if len(known) >= MAX_ROSTER:
            raise EnrolmentError(f"Expected at most {MAX_ROSTER} sites. Delete the records of revoked ones in sites/.")
        return Candidate(enrolment, known=False)
    if own.revoked is not None:
        _require_readmission(own, enrolment, readmit)
        return Candidate(enrolment, known=False)
    _require_successor(own, enrolment)
    return Candidate(enrolment, known=True, same_key=enrolment.node_key == own.node_key)


def enrol(consortium: Consortium, enrolment: Enrolment, now: datetime) -> bytes:
    """Enrol a site that `read_candidate` has let pass and a person has compared; no other site's files change.

    Returns:
        The invitation for this site, signed.

    Raises:
        EnrolmentError: The certificate authority does not hold now.
        StorageError: A file cannot be read or written.
    """
    settings = read_settings(consortium)
    authority = read_bounded(consortium.ca_pem, MAX_RECORD_BYTES)
    read_authority(authority, now)
    record = SiteRecord(
        name=enrolment.site,
        identity=enrolment.identity,
        node_key=enrolment.node_key,
        created=enrolment.created,
        enrolled=now,
    )
    _write(consortium, record)
    roster = [item for item in records(consortium).values() if item.revoked is None]
    key = load_key(consortium.key)
    invitation = Invitation(
        created=now,
        federation=settings.name,
        host=settings.host,
        port=settings.port,
        authority=authority.decode(),
        coordinator=key.verify_key.to_bytes().hex(),
        site=enrolment.site,
        identity=enrolment.identity,
        node_key=enrolment.node_key,
        roster=tuple(Member(site=item.name, identity=item.identity) for item in roster),
        expires=now + timedelta(days=INVITATION_DAYS),
    )
    return write_invitation(invitation, key)


def revoke(consortium: Consortium, name: str, now: datetime) -> SiteRecord:
    """Mark a site as revoked; its record stays, so that its old file cannot bring it back.

    Raises:
        EnrolmentError: No such site was enrolled, or it was revoked before.
        StorageError: A record cannot be read or written.
    """
    record = require_site(consortium, name)
    if record.revoked is not None:
        raise EnrolmentError(
            f"{name} was revoked at {record.revoked:%Y-%m-%d %H:%M} UTC already. Nothing is to be done."
        )
    changed = record.model_copy(update={"revoked": now})
    _write(consortium, changed)
    return changed


def renew(consortium: Consortium, now: datetime, authority: bool = False) -> Validity:
    """Make a new server certificate for the host in federation.toml, and on demand one of the authority first.

    Both keep their keys, so that what sites have pinned goes on to hold. A server key that was deleted is made anew.

    Args:
        consortium: The coordinator's home.
        now: The certificates hold from a day before.
        authority: Renew the certificate authority's certificate too.

    Returns:
        When the new server certificate holds.

    Raises:
        EnrolmentError: The certificate authority has run out and was not renewed.
        StorageError: A file cannot be read or written.

    Guarantees:
        - without_new_kits: A site that pinned the authority before trusts the new server certificate.
    """
    settings = read_settings(consortium)
    if authority:
        consortium_key = read_secret(consortium.ca_key, MAX_SECRET_BYTES)
        write_atomic(consortium.ca_pem, authority_certificate(consortium_key, settings.name, now))
    return _write_server_certificate(consortium, settings, now)


def _make_certificates(consortium: Consortium, settings: FederationConfig, now: datetime) -> None:
    if not consortium.ca_key.exists():
        write_atomic(consortium.ca_key, new_key(), 0o600)
    key = read_secret(consortium.ca_key, MAX_SECRET_BYTES)
    write_atomic(consortium.ca_pem, authority_certificate(key, settings.name, now))
    _write_server_certificate(consortium, settings, now)


def _write_server_certificate(consortium: Consortium, settings: FederationConfig, now: datetime) -> Validity:
    if not consortium.server_key.exists():
        write_atomic(consortium.server_key, new_key(), 0o600)
    authority_key = read_secret(consortium.ca_key, MAX_SECRET_BYTES)
    authority = read_bounded(consortium.ca_pem, MAX_RECORD_BYTES)
    key = read_secret(consortium.server_key, MAX_SECRET_BYTES)
    certificate = server_certificate(authority_key, authority, key, settings.host, now)
    write_atomic(consortium.server_pem, certificate)
    return validity(certificate)


def _require_own(enrolment: Enrolment, others: list[SiteRecord]) -> None:
    for other in others:
        if other.name.lower() == enrolment.site.lower():
            raise EnrolmentError(
                f"The name {enrolment.site} differs from the enrolled {other.name} in upper and lower case only. The "
                "site chooses another name: `fedmedgan-site init`."
            )
        if other.identity == enrolment.identity or other.node_key == enrolment.node_key:
            raise EnrolmentError(
                f"{enrolment.site} shows a key of the enrolled {other.name}: a home was copied or renamed, or one site "
                "poses as two. Every site makes its own home with `fedmedgan-site init`."
            )


def _require_readmission(own: SiteRecord, enrolment: Enrolment, readmit: bool) -> None:
    since = own.revoked or own.enrolled
    if not readmit:
        raise EnrolmentError(
            f"{own.name} was revoked at {since:%Y-%m-%d %H:%M} UTC. To let it back, ask the site for a new file and "
            "enrol it with --readmit."
        )
    if enrolment.created <= since:
        raise EnrolmentError(
            f"The enrolment of {own.name} is from before the site was revoked at {since:%Y-%m-%d %H:%M} UTC. Ask the "
            "site for a new file: `fedmedgan-site enrol`."
        )
    if enrolment.node_key == own.node_key:
        raise EnrolmentError(
            f"{own.name} shows the node key that was revoked. The site runs `fedmedgan-site leave`, then "
            "`fedmedgan-site enrol`, and sends the new file."
        )


def _require_successor(own: SiteRecord, enrolment: Enrolment) -> None:
    if enrolment.identity != own.identity:
        raise EnrolmentError(
            f"{own.name} is enrolled with another identity ({own.identity[:16]}, this file: "
            f"{enrolment.identity[:16]}). Call the site. If its home was lost: `fedmedgan-coordinator revoke`, then "
            "enrol with --readmit."
        )
    changed = enrolment.node_key != own.node_key
    if enrolment.created < own.created or (changed and enrolment.created == own.created):
        raise EnrolmentError(
            f"The enrolment of {own.name} was made at {enrolment.created:%Y-%m-%d %H:%M} UTC, before the one that is "
            f"enrolled ({own.created:%Y-%m-%d %H:%M}): an old file again. Ask the site for a new one."
        )


def _write(consortium: Consortium, record: SiteRecord) -> None:
    write_atomic(consortium.site(record.name), (record.model_dump_json(indent=1) + "\n").encode(), 0o600)
