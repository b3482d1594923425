"""Who may take part in a run, and as which node: read anew before each look at who is here.

The link draws a node's id when it lets the node's key in, and writes beside the sites' records for which site it did.
The run compares: a signature shows which site answers, this shows that it answers through its own node. Out of scope:
who is let in (server/link), what is compared (server/roster).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from common.errors import StorageError
from common.files import read_bounded, write_atomic
from common.seal import Trust
from server.consortium import Consortium, load_trust

MAX_NODES_BYTES = 1 << 20


@final
@dataclass(frozen=True)
class Registered:
    """Who may take part.

    Attributes:
        trust: The coordinator's key and those of the sites that are enrolled and not revoked.
        nodes: The site that each node was let in as.
    """

    trust: Trust
    nodes: Mapping[int, str]


def read_registered(consortium: Consortium) -> Registered:
    """Return who may take part now.

    Raises:
        StorageError: A key, a record or the list of nodes cannot be read.
        WireError: The coordinator's key is no key file of a known version.
    """
    return Registered(load_trust(consortium), read_nodes(consortium))


def write_nodes(consortium: Consortium, nodes: Mapping[int, str]) -> None:
    """Write as which site each node was let in.

    Raises:
        StorageError: The file cannot be written.
    """
    write_atomic(consortium.nodes, json.dumps(dict(nodes)).encode(), 0o600)


def read_nodes(consortium: Consortium) -> dict[int, str]:
    """Return what `write_nodes` wrote; nothing where no link has let anybody in yet.

    Raises:
        StorageError: It does not read.
    """
    if not consortium.nodes.exists():
        return {}
    try:
        stored: dict[str, Any] = json.loads(read_bounded(consortium.nodes, MAX_NODES_BYTES))
        return {int(node): str(name) for node, name in stored.items()}
    except (ValueError, AttributeError) as error:
        raise StorageError(
            f"{consortium.nodes} does not read. Delete it and restart the coordinator, which writes it anew."
        ) from error
