"""What Flower does of its own accord, switched off: telemetry, update check, installing what a bundle asks for."""

import os

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Flower reads some of these as it is imported."""


def quieten() -> None:
    """Switch it off for this process and its children; to be called before the first import of flwr."""
    os.environ.update(QUIET)
