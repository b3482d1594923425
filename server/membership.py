"""The commands on a coordinator's home: `init`, `enrol`, `revoke`, `renew`, `sites`. None needs a running server.

Out of scope: what they write (server/enrol).
"""

import shlex
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from common.certificates import validity
from common.crypto import VerifyKey, load_key
from common.enrolment import MAX_DOCUMENT_BYTES
from common.errors import ConfigError
from common.files import read_bounded, write_atomic
from common.fingerprint import require_words, words_of
from common.wording import wrong_values
from server import enrol as enrolment
from server.consortium import (
    MAX_RECORD_BYTES,
    Consortium,
    FederationConfig,
    load_consortium,
    read_settings,
    records,
)

RENEW_DAYS = 30
"""So long before a certificate ends `sites` says so."""

HomeArgument = Annotated[Path, typer.Argument(help="The coordinator's home folder.")]


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `fedmedgan-coordinator`."""
    for command in (init, enrol, revoke, renew, sites):
        app.command()(command)


def init(
    home: HomeArgument,
    host: Annotated[str, typer.Option(help="The public DNS name or IP address by which sites reach this server.")],
    name: Annotated[str, typer.Option(help="The federation's name, public.")] = "federation",
    port: Annotated[int, typer.Option(help="The one inbound port.")] = 8443,
    control_port: Annotated[int, typer.Option(help="Of the control API, on loopback only.")] = 8444,
) -> None:
    """Make a coordinator's home.

    Certificate authority, server certificate, signing key, secrets.
    """
    try:
        settings = FederationConfig(name=name, host=host, port=port, control_port=control_port)
    except ValidationError as error:
        raise ConfigError(f"Expected other values: {wrong_values(error.errors())}. Mend the flags.") from error
    made = enrolment.create_consortium(home, settings, datetime.now(UTC))
    print(f"home: {made.folder}; keep a backup of it where only you can read it")
    print(f"sites connect to {settings.address}; let that port in, and no other")
    _print_words(made)
    print(f"next: fedmedgan-coordinator enrol {shlex.quote(str(home))} NAME.enrolment.json, the file that a site sends")


def enrol(
    home: HomeArgument,
    file: Annotated[Path, typer.Argument(help="The file that the site sent.")],
    words: Annotated[
        str | None, typer.Option(help="The site's words, as read by phone; without, they are shown and asked.")
    ] = None,
    readmit: Annotated[bool, typer.Option("--readmit", help="Let a revoked site back.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default NAME.invitation.json in the current folder.")
    ] = None,
) -> None:
    """Enrol a site and write its invitation.

    Its words are compared by phone first. Enrolled again, it gets a new node key or file.
    """
    consortium, now = load_consortium(home), datetime.now(UTC)
    found = enrolment.read_candidate(consortium, read_bounded(file, MAX_DOCUMENT_BYTES), now, readmit)
    site = found.enrolment.site
    target = out or Path(f"{site}.invitation.json")
    if target.resolve().is_relative_to(home.resolve()):
        raise ConfigError(f"Expected {target} outside the home folder, whose files it could overwrite. Name another.")
    if not found.known:
        require_words(found.enrolment.verify_key, "site", words)
    write_atomic(target, enrolment.enrol(consortium, found.enrolment, now))
    if found.same_key:
        print(f"{site} is already enrolled with this key; the invitation is written again: {target}")
    else:
        print(f"{site} is enrolled{' with its new node key' if found.known else ''}; send it {target}")
    _print_words(consortium)


def revoke(home: HomeArgument, name: Annotated[str, typer.Argument(help="The site's name.")]) -> None:
    """Revoke a site, at once.

    Its node is not let in again, and its old file cannot bring it back.
    """
    record = enrolment.revoke(load_consortium(home), name, datetime.now(UTC))
    print(f"{record.name} is revoked; no other site's files change")


def renew(
    home: HomeArgument,
    ca: Annotated[bool, typer.Option("--ca", help="Renew the certificate authority's certificate too.")] = False,
) -> None:
    """Make a new server certificate.

    What the sites have pinned goes on to hold.
    """
    consortium = load_consortium(home)
    held = enrolment.renew(consortium, datetime.now(UTC), ca)
    print(f"the server certificate holds until {held.ends:%Y-%m-%d}; sites need nothing new")
    print("a server that runs shows it within seconds; one that does not, when it starts")


def sites(home: HomeArgument) -> None:
    """List the enrolled sites, and when the certificates end."""
    consortium = load_consortium(home)
    settings = read_settings(consortium)
    table = Table("site", "enrolled", "state", "words", title=f"{settings.name} at {settings.address}")
    for record in records(consortium).values():
        state = "enrolled" if record.revoked is None else f"revoked {record.revoked:%Y-%m-%d}"
        words = words_of(VerifyKey(bytes.fromhex(record.identity)), "site")
        table.add_row(record.name, f"{record.enrolled:%Y-%m-%d}", state, words)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    _print_words(consortium)
    for what, path, flag in (("server", consortium.server_pem, ""), ("authority", consortium.ca_pem, " --ca")):
        ends = validity(read_bounded(path, MAX_RECORD_BYTES)).ends
        print(f"certificate of the {what}: until {ends:%Y-%m-%d}")
        if ends - datetime.now(UTC) < timedelta(days=RENEW_DAYS):
            command = f"fedmedgan-coordinator renew {shlex.quote(str(home))}{flag}"
            print(f"warning: it ends in less than {RENEW_DAYS} days, or has: {command}", file=sys.stderr)


def _print_words(consortium: Consortium) -> None:
    key = load_key(consortium.key).verify_key
    print(f"words of the coordinator, to read to a site by phone: {words_of(key, 'coordinator')}")
