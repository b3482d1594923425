"""What a relay says of itself in a file: for `status`, and for the next relay, which signs a killed one off.

Nothing else depends on it: a full disk leaves it behind and ends nothing. Imports no flwr.
"""

import json
import logging
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from common.errors import StorageError, WireError
from common.files import read_bounded, write_atomic

LOG = logging.getLogger("fedmedgan.relay")

STATE_S = 15.0
"""Between two notes of the last contact."""
MAX_STATE_BYTES = 1 << 16
STOPPED = "stopped"
"""Why a relay ended that was asked to; other ends are told by their error."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@final
@dataclass
class State:
    """What is written at changes and now and then.

    Guarantees:
        - disk_may_be_full: What cannot be written ends nothing.
    """

    path: Path
    started: str = field(default_factory=_now)
    node_id: int = 0
    messages: int = 0
    last_message: str = ""
    written: float = 0.0

    def note(self, *, message: bool = False) -> None:
        """Note a contact with the link, and whether it brought a message."""
        if message:
            self.messages, self.last_message = self.messages + 1, _now()
        if message or time.monotonic() - self.written > STATE_S:
            values = {"pid": os.getpid(), "started": self.started, "node": self.node_id, "contact": _now()}
            self._write({**values, "messages": self.messages, "last_message": self.last_message})
            self.written = time.monotonic()

    def end(self, why: str) -> None:
        """Note why the relay ends, beside what was noted last."""
        self._write({**_read(self.path), "ended": why})

    def _write(self, values: dict[str, Any]) -> None:
        try:
            write_atomic(self.path, (json.dumps(values) + "\n").encode(), 0o600)
        except StorageError as error:
            LOG.error("%s", error)


def node_before(path: Path) -> int:
    """Return the node that an earlier relay of this home was; 0 where there was none."""
    node = _read(path).get("node")
    return node if isinstance(node, int) and 0 < node < 2**64 else 0


def why_ended(path: Path) -> str:
    """Return why the last relay of this home ended by itself; empty where it runs, was stopped, or there was none."""
    why = _read(path).get("ended")
    return why if isinstance(why, str) and why != STOPPED else ""


def read_state(path: Path) -> dict[str, Any]:
    """Read what a process last said of itself; nothing where the file is not there.

    Raises:
        StorageError: It cannot be read, is too long, or is no JSON.
    """
    try:
        values = json.loads(read_bounded(path, MAX_STATE_BYTES)) if path.exists() else {}
    except (OSError, StorageError, WireError, ValueError, RecursionError) as error:
        raise StorageError(f"Could not read {path}: {type(error).__name__}. Remove it; it is written anew.") from error
    return values if isinstance(values, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_state(path)
    except StorageError:
        return {}
