"""The coordinator's home folder: address, certificates, keys, and the sites that are enrolled.

    federation.toml         name, host, port, control_port, database (the coordinator's file)
    ca.key, ca.pem          the certificate authority of this federation, which every site pins
    server.key, server.pem  what the server shows
    keys/coordinator.json   the key that signs invitations and requests
    control.token           what the control API asks for
    superexec.secret        what the ServerApp's executor shows
    sites/NAME.json         an enrolled site
    nodes.json              as which site the link has let each node in
    start.lock, running/    held by the coordinator and by the process of each run, as long as they live
    submit.lock             held while a run is submitted
    link.db, logs/, runs/   what the running link and the runs write

Secrets have mode 0600. Out of scope: how a site is enrolled or revoked (server/enrol), the link itself.
"""

import ipaddress
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from common.crypto import VerifyKey, load_key
from common.enrolment import FederationName, HexKey, Host, Moment, NodeKey, Port, SiteName
from common.errors import ConfigError, EnrolmentError, StorageError
from common.files import read_bounded
from common.seal import Trust
from common.wording import wrong_values

MAX_SETTINGS_BYTES = 65_536
MAX_RECORD_BYTES = 16_384
MAX_SECRET_BYTES = 4096


def _plain_name(value: str) -> str:
    if Path(value).name != value or value in ("", ".", ".."):
        raise ValueError("expected the name of a file in the coordinator's home, without a folder")
    return value


@final
class FederationConfig(BaseModel):
    """federation.toml: where the server is reached, and by what name the federation goes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: FederationName
    host: Host
    """The public DNS name or IP address that sites connect to."""
    port: Port = 8443
    """The one inbound port."""
    control_port: Port = 8444
    """On loopback only."""
    database: Annotated[str, AfterValidator(_plain_name)] = "link.db"
    """The link's SQLite file in this folder."""

    @model_validator(mode="after")
    def _two_ports(self) -> "FederationConfig":
        if self.port == self.control_port:
            raise ValueError(f"port and control_port are both {self.port}: the control API has a port of its own")
        return self

    @property
    def address(self) -> str:
        """Return host and port as they stand in a URL."""
        try:
            return f"[{ipaddress.IPv6Address(self.host)}]:{self.port}"
        except ValueError:
            return f"{self.host}:{self.port}"


@final
@dataclass(frozen=True)
class Consortium:
    """The paths of a coordinator's home folder."""

    folder: Path

    @property
    def settings(self) -> Path:
        """Return the path of the coordinator's settings."""
        return self.folder / "federation.toml"

    @property
    def ca_key(self) -> Path:
        """Return the path of the certificate authority's private key."""
        return self.folder / "ca.key"

    @property
    def ca_pem(self) -> Path:
        """Return the path of the certificate authority's certificate."""
        return self.folder / "ca.pem"

    @property
    def server_key(self) -> Path:
        """Return the path of the server's private key."""
        return self.folder / "server.key"

    @property
    def server_pem(self) -> Path:
        """Return the path of the server's certificate."""
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        """Return the path of the coordinator's signing key."""
        return self.folder / "keys" / "coordinator.json"

    @property
    def control_token(self) -> Path:
        """Return the path of the token of the control API: 64 letters, no newline."""
        return self.folder / "control.token"

    @property
    def superexec_secret(self) -> Path:
        """Return the path of the secret of the ServerApp's executor: 64 letters, no newline."""
        return self.folder / "superexec.secret"

    @property
    def lock(self) -> Path:
        """Return the path of the lock that the one coordinator at work on this home holds."""
        return self.folder / "start.lock"

    @property
    def submitting(self) -> Path:
        """Return the path of the lock that is held from the look at what is under way until a run is submitted."""
        return self.folder / "submit.lock"

    @property
    def running(self) -> Path:
        """Return the folder of the locks that the processes of runs hold."""
        return self.folder / "running"

    @property
    def sites(self) -> Path:
        """Return the folder of the enrolled sites."""
        return self.folder / "sites"

    @property
    def database(self) -> Path:
        """Return the path of the link's database."""
        return self.folder / read_settings(self).database

    @property
    def logs(self) -> Path:
        """Return the folder of the logs."""
        return self.folder / "logs"

    @property
    def runs(self) -> Path:
        """Return the folder of the runs."""
        return self.folder / "runs"

    def run_lock(self, number: int) -> Path:
        """Return the path of the lock that the process of a run holds, by the link's number of the run."""
        return self.running / str(number)

    @property
    def nodes(self) -> Path:
        """Return the path of the list of nodes that the link has let in."""
        return self.folder / "nodes.json"

    def site(self, name: str) -> Path:
        """Return the path of one site's record."""
        return self.sites / f"{name}.json"


@final
class SiteRecord(BaseModel):
    """sites/NAME.json: what a site declared when it was enrolled, and whether it was revoked."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: SiteName
    identity: HexKey
    node_key: NodeKey
    created: Moment
    """When the site made the file that was enrolled last: an older one is a replay."""
    enrolled: Moment
    revoked: Moment | None = None


@final
@dataclass(frozen=True)
class EnrolledSite:
    """A site that the coordinator knows."""

    name: str
    verify_key: VerifyKey
    """Its identity, which signs its replies."""
    node_public_key: bytes
    """Its node's key, one line in OpenSSH's form."""
    revoked: bool


def load_consortium(folder: Path) -> Consortium:
    """Open a coordinator's home; its settings are read, so that faults in them show at once.

    Raises:
        StorageError: It is none, or cannot be read.
        ConfigError: federation.toml has an unknown key or a bad value.
    """
    consortium = Consortium(folder)
    read_settings(consortium)
    return consortium


def read_settings(consortium: Consortium) -> FederationConfig:
    """Read federation.toml.

    Raises:
        StorageError: It is missing or cannot be read.
        ConfigError: It is not TOML, or has an unknown key or a bad value.
    """
    if not consortium.settings.exists():
        raise StorageError(
            f"No coordinator's home stands in {consortium.folder}. `fedmedgan-coordinator init "
            f"{consortium.folder} --host NAME` makes one."
        )
    try:
        content = read_bounded(consortium.settings, MAX_SETTINGS_BYTES)
        return FederationConfig.model_validate(tomllib.loads(content.decode()))
    except ValidationError as error:
        raise ConfigError(f"Expected other values in {consortium.settings}: {wrong_values(error.errors())}.") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(f"{consortium.settings} is not TOML: {error}. Mend it.") from error


def records(consortium: Consortium) -> Mapping[str, SiteRecord]:
    """Read every site's record, by name.

    Raises:
        StorageError: One cannot be read, was changed by hand to what is no record, or was renamed.
    """
    read = [_record(path) for path in sorted(consortium.sites.glob("*.json"))]
    return {record.name: record for record in read}


def enrolled(consortium: Consortium) -> dict[str, EnrolledSite]:
    """Return every site that was ever enrolled, by name; who was revoked is marked, and must not take part.

    Raises:
        StorageError: A record cannot be read: nobody is let in on half a list.
    """
    return {
        name: EnrolledSite(
            name=name,
            verify_key=VerifyKey(bytes.fromhex(record.identity)),
            node_public_key=record.node_key.encode(),
            revoked=record.revoked is not None,
        )
        for name, record in records(consortium).items()
    }


def load_trust(consortium: Consortium) -> Trust:
    """Return the coordinator's key and those of the sites that may take part: enrolled and not revoked.

    Raises:
        StorageError: A key or a record cannot be read.
        WireError: The coordinator's key is no key file of a known version.
    """
    sites = {name: site.verify_key for name, site in enrolled(consortium).items() if not site.revoked}
    return Trust(load_key(consortium.key), sites)


def require_site(consortium: Consortium, name: str) -> SiteRecord:
    """Return one site's record.

    Raises:
        EnrolmentError: No such site was enrolled; the message names those that were.
        StorageError: A record cannot be read.
    """
    known = records(consortium)
    if name not in known:
        names = ", ".join(sorted(known)) or "none"
        raise EnrolmentError(f"Expected the name of an enrolled site, got {name!r}. Enrolled: {names}.")
    return known[name]


def _record(path: Path) -> SiteRecord:
    try:
        record = SiteRecord.model_validate_json(read_bounded(path, MAX_RECORD_BYTES), strict=True)
    except ValidationError as error:
        raise StorageError(
            f"{path} is not a site's record: {wrong_values(error.errors())}. Restore it from a backup, or delete it "
            "and enrol the site again."
        ) from error
    if path.stem != record.name:
        raise StorageError(f"{path} is the record of {record.name}: it was renamed. Give it back its name.")
    return record
