"""The coordinator's home: the paths of its files and the sites that are enrolled.

federation.toml       address, ports, database
ca.pem, server.pem    what sites trust, and what this server shows
sites/NAME.json       the enrolled sites
runs/                 the run folders
link.db, logs/        the link's state, and one log a process
"""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.crypto import VerifyKey
from common.errors import ConfigError, StorageError


@final
class Settings(BaseModel):
    """federation.toml: where sites reach this coordinator.

    Attributes:
        host: The public name or address, as it stands in the server's certificate.
        port: The one public port.
        control_port: The port on loopback.
        database: The link's database; a relative path starts at the coordinator's home.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    host: str
    port: int = Field(ge=1, le=65535)
    control_port: int = Field(ge=1, le=65535)
    database: str = "link.db"


@final
@dataclass(frozen=True)
class EnrolledSite:
    """A site that may connect, unless it is revoked."""

    name: str
    verify_key: VerifyKey
    node_public_key: bytes
    revoked: bool


@final
@dataclass(frozen=True)
class Consortium:
    """The paths of a coordinator's home."""

    folder: Path

    @property
    def settings(self) -> Path:
        """Return the path of federation.toml."""
        return self.folder / "federation.toml"

    @property
    def ca_pem(self) -> Path:
        """Return the path of the certificate that sites trust."""
        return self.folder / "ca.pem"

    @property
    def server_pem(self) -> Path:
        """Return the path of the server's certificate."""
        return self.folder / "server.pem"

    @property
    def server_key(self) -> Path:
        """Return the path of the server certificate's private key."""
        return self.folder / "server.key"

    @property
    def control_token(self) -> Path:
        """Return the path of the token that the control API asks for."""
        return self.folder / "control.token"

    @property
    def superexec_secret(self) -> Path:
        """Return the path of the secret under which the executor takes runs."""
        return self.folder / "superexec.secret"

    @property
    def sites(self) -> Path:
        """Return the folder of the enrolled sites."""
        return self.folder / "sites"

    @property
    def logs(self) -> Path:
        """Return the folder of the logs."""
        return self.folder / "logs"

    @property
    def runs(self) -> Path:
        """Return the folder of the run folders."""
        return self.folder / "runs"

    @property
    def database(self) -> Path:
        """Return the path of the link's database."""
        return self.folder / read_settings(self).database


def load_consortium(folder: Path) -> Consortium:
    """Return the paths of a coordinator's home, which must stand.

    Raises:
        ConfigError: No home stands there.
    """
    consortium = Consortium(folder)
    if not consortium.settings.exists():
        raise ConfigError(f"No coordinator's home stands in {folder}. Make one: fedmedgan-coordinator init {folder}")
    return consortium


def read_settings(consortium: Consortium) -> Settings:
    """Read federation.toml.

    Raises:
        ConfigError: It is missing, not TOML, or a value is wrong.
    """
    try:
        return Settings.model_validate(tomllib.loads(consortium.settings.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise ConfigError(f"Could not read {consortium.settings}: {error}. Mend it.") from error


def enrolled(consortium: Consortium) -> dict[str, EnrolledSite]:
    """Return the enrolled sites by name, revoked ones too.

    Raises:
        StorageError: A file cannot be read.
    """
    sites: dict[str, EnrolledSite] = {}
    for path in sorted(consortium.sites.glob("*.json")):
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            key, node = VerifyKey(bytes.fromhex(tree["identity"])), tree["node_public_key"].encode()
            sites[tree["name"]] = EnrolledSite(tree["name"], key, node, bool(tree["revoked"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{path} is no enrolled site: {type(error).__name__}. Enrol the site again.") from error
    return sites
