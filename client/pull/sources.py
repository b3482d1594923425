"""`pacs.toml`: which archives a site may pull from, and within which bounds. Out of scope: talking to them."""

import ipaddress
import re
import tomllib
from datetime import time
from pathlib import Path
from typing import Annotated, Literal, Self, final
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from common.errors import ConfigError, FedmedganError
from common.files import read_bounded, read_secret

FILE = "pacs.toml"
MAX_FILE_BYTES = 1 << 16
MAX_SECRET_BYTES = 1 << 14
_WINDOW = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)")
_STRICT = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

AeTitle = Annotated[str, Field(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]
"""One to sixteen printable characters without a backslash (PS3.5 6.2, AE)."""
Port = Annotated[int, Field(ge=1, le=65535)]
_SECRET = ("password", "token")


class Bounds(BaseModel):
    """What one pull may bring and how fast.

    Attributes:
        hours: `HH:MM-HH:MM` by the machine's clock; retrievals begin within it only. It may pass midnight.
        per_minute: Instances a minute at most.
        max_files: Instances of one pull at most.
        max_bytes: Bytes of one pull at most.
        max_file_bytes: Bytes of one instance at most.
        free_bytes: What stays free on the inbox's disk, bytes.
        timeout_s: How long an answer may take, seconds.
    """

    model_config = _STRICT

    hours: str | None = None
    per_minute: int | None = Field(default=None, ge=6, le=1_000_000)  # slower, and the PACS takes us for dead
    max_files: int = Field(default=1_000_000, ge=1)
    max_bytes: int = Field(default=2 * 10**12, ge=1)
    max_file_bytes: int = Field(default=1 << 30, ge=1 << 10)
    free_bytes: int = Field(default=5 * 10**9, ge=0)
    timeout_s: float = Field(default=120.0, gt=0, le=3600)

    @field_validator("hours")
    @classmethod
    def _two_times(cls, value: str | None) -> str | None:
        if value is not None:
            parse_window(value)
        return value

    @property
    def window(self) -> tuple[time, time] | None:
        """Return when a retrieval may begin, and until when; None: always."""
        return parse_window(self.hours) if self.hours is not None else None


@final
class DimseSource(Bounds):
    """An archive that is asked by DIMSE: C-ECHO, C-FIND, and C-GET or C-MOVE.

    Attributes:
        host: Name or address of the PACS.
        port: Its DICOM port.
        aet: Its AE title.
        our_aet: The AE title under which the PACS knows this machine.
        method: `get`: images come over our own connection. `move`: the PACS connects to us, for which it has to know
            `our_aet` with `listen` and `listen_port`.
        listen: Our own address on which the PACS reaches us; with `move` only, and while a pull runs only.
        listen_port: The port there.
        sender_aet: The AE title by which the PACS sends; `aet` unless stated.
        sender_hosts: From which hosts it sends; `host` unless stated.
        tls_ca: Certificates (PEM) that vouch for the PACS; stated: everything goes through TLS.
        tls_cert: Our own certificate (PEM); `move` needs it with TLS.
        tls_key: Its key (PEM), mode 600.
    """

    kind: Literal["dimse"]
    host: str = Field(min_length=1, max_length=253)
    port: Port
    aet: AeTitle
    our_aet: AeTitle
    method: Literal["get", "move"] = "get"
    listen: str | None = None
    listen_port: Port | None = None
    sender_aet: AeTitle | None = None
    sender_hosts: tuple[str, ...] | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    @model_validator(mode="after")
    def _move_has_an_address(self) -> Self:
        if self.method == "move":
            if self.listen is None or self.listen_port is None:
                raise ValueError('method = "move" needs listen and listen_port: where the PACS reaches this machine')
            if ipaddress.ip_address(self.listen).is_unspecified:
                raise ValueError("listen has to be the one address on which the PACS reaches this machine")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together")
        if self.tls_ca is None and self.tls_cert is not None:
            raise ValueError("tls_cert needs tls_ca: the certificates that vouch for the PACS")
        if self.tls_ca is not None and self.method == "move" and self.tls_cert is None:
            raise ValueError('method = "move" with TLS needs tls_cert and tls_key')
        return self


@final
class WebSource(Bounds):
    """An archive that is asked by DICOMweb: QIDO-RS and WADO-RS.

    Attributes:
        url: The service's root, below which `/studies` stands. A password or token goes over https or loopback only.
        ca: Certificates (PEM) that vouch for it; the system's unless stated.
        user: For HTTP basic authentication.
        password_file: Holds its password; mode 600.
        token_file: Holds a bearer token; mode 600.
    """

    kind: Literal["dicomweb"]
    url: str = Field(max_length=2000)
    ca: str | None = None
    user: str | None = None
    password_file: str | None = None
    token_file: str | None = None

    @model_validator(mode="after")
    def _secrets_are_not_sent_in_clear(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("url has to be http(s)://host[:port]/path, without ? and #")
        if parts.username is not None or parts.password is not None:
            raise ValueError("url holds no user and password: name user and password_file")
        if (self.user is None) != (self.password_file is None):
            raise ValueError("user and password_file belong together")
        if self.user is not None and self.token_file is not None:
            raise ValueError("name a password_file or a token_file, not both")
        if parts.scheme == "http" and self.secret_file is not None and not _is_loopback(parts.hostname):
            raise ValueError("a password or token goes over https only")
        return self

    @property
    def secret_file(self) -> str | None:
        """Return the name of the file with password or token."""
        return self.password_file or self.token_file


Source = DimseSource | WebSource


@final
class Sources(BaseModel):
    """All of `pacs.toml`.

    Attributes:
        inbox: Where what is pulled goes; `inbox` in the home unless stated. Absolute.
        sources: The archives by name.
    """

    model_config = _STRICT

    inbox: str | None = None
    sources: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,32}$")], Annotated[Source, Field(discriminator="kind")]
    ]

    @field_validator("inbox")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_absolute():
            raise ValueError("expected an absolute path")
        return value


def read_sources(home: Path) -> Sources:
    """Read `pacs.toml` of a home.

    Raises:
        ConfigError: It is missing, not TOML, or holds unknown keys or values out of bounds; values are not quoted.

    Guarantees:
        - no_secret_in_the_file: A password or token written into the file itself is refused, and not repeated.
    """
    path = home / FILE
    try:
        values = tomllib.loads(read_bounded(path, MAX_FILE_BYTES).decode())
        return Sources.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {_said(item)}" for item in error.errors())
        secret = any(item["loc"] and item["loc"][-1] in _SECRET for item in error.errors())
        hint = " A secret belongs into a file of mode 600: password_file, token_file." if secret else ""
        raise ConfigError(f"Expected other values in {path}: {wrong}.{hint} See docs/pull.md.") from None
    except FedmedganError as error:
        raise ConfigError(f"{error} docs/pull.md says how to write it.") from None
    except ValueError:  # TOMLDecodeError and UnicodeDecodeError; the cause quotes the file
        raise ConfigError(f"{path} is not TOML. Write it as docs/pull.md says.") from None


def _said(error: ErrorDetails) -> str:
    """Return what pydantic says of a value, without the value."""
    return 'expected kind = "dimse" or "dicomweb"' if error["type"].startswith("union_tag") else error["msg"]


def find_source(sources: Sources, name: str) -> Source:
    """Return one archive.

    Raises:
        ConfigError: None has this name.
    """
    if name not in sources.sources:
        raise ConfigError(f"Expected one of {', '.join(sorted(sources.sources)) or 'none'} as --from, got {name!r}.")
    return sources.sources[name]


def load_secret(path: str) -> SecretStr:
    """Read a password or token: the first line of a file that only its owner may read.

    Raises:
        StorageError: It cannot be read, or others may read it.
        ConfigError: It is empty or not text.
    """
    try:
        lines = read_secret(Path(path), MAX_SECRET_BYTES).decode().splitlines()
    except UnicodeDecodeError:
        lines = []
    if not lines or not lines[0].strip():
        raise ConfigError(f"Expected a password or token in the first line of {path}, found none.")
    return SecretStr(lines[0].strip())


def parse_window(text: str) -> tuple[time, time]:
    """Return the two times of `HH:MM-HH:MM`.

    Raises:
        ValueError: It is another form, or both are the same.
    """
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError('expected "HH:MM-HH:MM"')
    hours = [int(part) for part in found.groups()]
    window = time(hours[0], hours[1]), time(hours[2], hours[3])
    if window[0] == window[1]:
        raise ValueError("begin and end are the same; leave hours out to pull at any time")
    return window


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
