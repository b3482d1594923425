"""The environment of every process that runs Flower: it phones nowhere, installs nothing, writes to one folder.

The one place where these switches are set. Out of scope: what each process does.
"""

import os
from collections.abc import Mapping
from pathlib import Path

LOCAL_HOSTS = "127.0.0.1,localhost"

_SWITCHES: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_OIDC_ENABLED": "0",
    "FLWR_INTERNAL_GRPC_CONTROL_API": "0",  # older listeners, without authentication
    "FLWR_INTERNAL_GRPC_FLEET_API": "0",
    "FLWR_TRACING_ENABLED": "0",
}


def flower_environment(home: Path, local: bool = True) -> dict[str, str]:
    """Return this process's environment with Flower's own connections and installations off.

    Args:
        home: The coordinator's or the site's home; Flower keeps its files in `flower/` below it, not in the user's.
        local: Whether the process talks to others of this machine, which no proxy may carry; a relay does not.

    Returns:
        A whole environment for a child process, or for `os.environ.update` before Flower is imported.

    Guarantees:
        - switches_win: What the caller's environment says of these switches does not matter.
        - loopback_goes_direct: If `local`, no proxy sees what the processes of one machine say to each other; other
          exceptions of the caller stay.
    """
    environment = {**os.environ, **_SWITCHES, "FLWR_HOME": str(home / "flower")}
    if not local:
        return environment
    before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    direct = f"{before},{LOCAL_HOSTS}" if before else LOCAL_HOSTS
    return {**environment, "NO_PROXY": direct, "no_proxy": direct}
