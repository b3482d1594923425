"""A site's site.toml, the data engineer's file: where the images are, how they are read, where the head's copy stands.

Out of scope: what the rules of reading mean (client/intake), what the site allows (client/policy).
"""

import os
import tomllib
from pathlib import Path
from typing import final

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from client.intake import IntakeRules
from client.paths import Home
from client.trust import MAX_SITE_BYTES
from common.config import GradientEngine
from common.errors import ConfigError
from common.files import open_regular
from common.wording import wrong_values


@final
class SiteConfig(BaseModel):
    """Where a site's images are and where their labels come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    """Folder or NPZ; relative paths start at the home folder."""
    label: str = "auto"
    gradients: GradientEngine = "fast"
    """How gradients of single patients are computed: `fast`, or `opacus`, the slower reference."""
    head_copy: str | None = None
    """File outside the home, better on another disk, that holds a copy of the ledger's signed head: with it an older
    ledger that is put back whole, with the whole home, is seen. Absolute."""
    extra_ca: str | None = None
    """File with the root certificate of a proxy that inspects TLS, which the relay then trusts beside the pinned one;
    what that gives away: client/trust. Absolute."""
    intake: IntakeRules = IntakeRules()
    """How images are read: client/intake/rules."""
    patients: str | None = None
    """CSV file that merges or corrects patients: client/intake/patients. Relative paths start at the home folder."""

    @field_validator("head_copy", "extra_ca")
    @classmethod
    def _absolute(cls, value: str | None, about: ValidationInfo) -> str | None:
        if value is not None and not Path(value).is_absolute():
            raise ValueError(f"expected an absolute path for {about.field_name}")
        return value


def read_site_config(home: Home) -> SiteConfig:
    """Read site.toml.

    Raises:
        ConfigError: It is missing, not TOML or has unknown keys.
    """
    try:
        with open_regular(home.folder / "site.toml") as handle:
            content = handle.read(MAX_SITE_BYTES + 1)
        if len(content) > MAX_SITE_BYTES:
            raise ConfigError(f"Expected site.toml of at most {MAX_SITE_BYTES} bytes. Write it anew: data = PATH")
        return SiteConfig.model_validate(tomllib.loads(content.decode()))
    except ValidationError as error:
        raise ConfigError(
            f"Expected other values in site.toml of the home folder: {wrong_values(error.errors())}."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"Could not read site.toml in the home folder {home.folder}: {error.strerror}. Name the folder that "
            "`fedmedgan-site init` made, or mend its permissions."
        ) from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(f"site.toml in the home folder is not TOML: {error}. Write it anew: data = PATH") from error


def head_copy(home: Home) -> Path | None:
    """Return where the copy of the ledger's head is kept, or None where site.toml names none.

    Raises:
        ConfigError: site.toml is missing or wrong, or the copy would stand inside the home.
    """
    site = read_site_config(home)
    require_copy_outside(home.folder, site)
    return Path(site.head_copy) if site.head_copy is not None else None


def require_copy_outside(folder: Path, site: SiteConfig) -> None:
    """Refuse a copy of the ledger's head inside the home that it watches.

    Raises:
        ConfigError: It would stand there.
    """
    if site.head_copy is not None and Path(site.head_copy).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"Expected head_copy={site.head_copy} outside the home {folder}: whoever puts an older home back would put "
            "the copy back with it. Name a file on another disk."
        )


def require_place(home: Home, site: SiteConfig) -> None:
    """Refuse a copy of the head where none can be kept, before a home is begun with it.

    Raises:
        ConfigError: Its folder is gone or not writable, or something stands in its place.
    """
    if site.head_copy is None:
        return
    path, begun = Path(site.head_copy), (home.ledger / "ledger.head.json").exists()
    if path.is_dir():
        raise ConfigError(f"Expected head_copy={path} as a file, it is a folder. Name a file in it.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"Expected the folder of head_copy={path} to be there and writable: mount its disk, or make the folder "
            "first."
        )
    if path.exists() and not begun:
        raise ConfigError(f"Found head_copy={path} there already, perhaps another home's. Name a new file.")
