"""Whom this site talks to: the pinned invitation. Out of scope: how it came to be pinned."""

import json
from dataclasses import dataclass
from typing import final

from client.paths import Home
from common.crypto import VerifyKey
from common.errors import ConfigError

MAX_FEDERATION_BYTES = 1 << 16


@final
@dataclass(frozen=True)
class Pinned:
    """What `join` accepted.

    Attributes:
        host: The coordinator's name or address.
        port: The port of its link.
        ca_pem: The authority that must have signed the link's certificate.
        coordinator: The key that must have signed its requests.
        site: This site's name.
        federation: The federation's name.
    """

    host: str
    port: int
    ca_pem: bytes
    coordinator: VerifyKey
    site: str
    federation: str


def load_pinned(home: Home) -> Pinned:
    """Read the pinned invitation.

    Raises:
        ConfigError: This site has not joined, or the file does not read.
    """
    try:
        content = home.federation.read_bytes()
        if len(content) > MAX_FEDERATION_BYTES:
            raise ValueError("too large")
        values = json.loads(content)
        key = VerifyKey.from_bytes(bytes.fromhex(values["coordinator"]))
        texts = (str(values["host"]), int(values["port"]), str(values["ca_pem"]).encode())
        return Pinned(*texts, key, str(values["site"]), str(values["federation"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"Expected the pinned invitation in {home.federation}: {type(error).__name__}. "
            "Join first: fedmedgan-site join HOME INVITATION"
        ) from error
