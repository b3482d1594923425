"""What a site adds to its pinned trust, or takes from it: an extra CA where TLS is inspected, and a list of bundles.

A hospital's proxy that inspects TLS shows a certificate of its own authority instead of the coordinator's. With
`extra_ca` in site.toml the relay trusts that authority too. What this gives away: whoever holds the proxy's key reads
and can hold back what relay and coordinator send each other: weights, protected releases, names and declared sizes. He
cannot forge it: requests are signed by the coordinator's pinned key and replies by the site's identity (common/seal),
neither of which rests on TLS. He can use this node's signed time to speak to the link in its place,
where he can take messages and lose replies. No patient is any worse off: what leaves was protected before.

SSL_CERT_FILE and the system's list of authorities change nothing: many systems set it to every public authority, and
the pin would be gone without anybody's decision. Part of the relay's side: no torch and no patient code.
"""

import re
import tomllib
from collections.abc import Set as AbstractSet
from pathlib import Path

from client.paths import Home
from common.certificates import extra_authorities
from common.closed import owners_of, require_closed, require_in_place
from common.errors import ConfigError, FedmedganError
from common.files import open_regular, read_bounded

MAX_BUNDLES_BYTES = 1 << 16
MAX_EXTRA_CA_BYTES = 1 << 16
MAX_SITE_BYTES = 1 << 16
_DIGEST = re.compile(r"[0-9a-f]{64}")


def trusted(home: Home, pinned: bytes) -> bytes:
    """Return the certificates that the relay trusts: the pinned authority's, then the extra ones.

    Args:
        home: Its site.toml may name an `extra_ca`; a relay's own home need not hold a site.toml.
        pinned: The pinned authority, in PEM.

    Raises:
        ConfigError: site.toml or the file that it names does not read, or holds more than the few authorities allowed.
        StorageError: Others can change that file.

    Guarantees:
        - pinned_alone: Without `extra_ca` nothing but the pinned authority is trusted, whatever the environment says.
    """
    return b"\n".join((pinned, *extra_ca(home)))


def extra_ca(home: Home) -> tuple[bytes, ...]:
    """Return the extra authorities, each in PEM; none where site.toml is missing or names no file.

    Raises:
        ConfigError, StorageError: As for `trusted`.
    """
    site = home.folder / "site.toml"
    if not site.exists():
        return ()
    try:
        named = tomllib.loads(read_bounded(site, MAX_SITE_BYTES).decode()).get("extra_ca")
    except (FedmedganError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(f"{site} does not read: {error}") from error
    if named is None:
        return ()
    if not isinstance(named, str) or not Path(named).is_absolute():
        raise ConfigError(f"Expected extra_ca in {site} as an absolute path, got {named!r}.")
    owners = owners_of(home.folder)
    require_closed(Path(named), owners=owners)
    require_in_place(Path(named), owners)
    try:
        return extra_authorities(read_bounded(Path(named), MAX_EXTRA_CA_BYTES))
    except FedmedganError as error:
        raise ConfigError(f"extra_ca of {site}: {error}") from error


def read_bundles(path: Path) -> AbstractSet[str] | None:
    """Read the list of bundles whose runs are served; None where the site keeps none.

    Raises:
        ConfigError: A line is no SHA-256, or the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BUNDLES_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"Could not read {path}: {error.strerror}. Mend its permissions, or remove it.") from error
    lines = [line.split(b"#")[0].strip().decode(errors="replace").lower() for line in content.splitlines()]
    wrong = [number for number, line in enumerate(lines, 1) if line and not _DIGEST.fullmatch(line)]
    if wrong or len(content) > MAX_BUNDLES_BYTES:
        raise ConfigError(
            f"Expected one SHA-256 of 64 hexadecimal digits a line in {path}, at most {MAX_BUNDLES_BYTES} bytes; wrong "
            f"lines: {wrong[:8]}. The coordinator tells the digest of its bundle."
        )
    return frozenset(line for line in lines if line)
