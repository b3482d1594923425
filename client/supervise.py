"""Agent and relay as two child processes that are started anew when they end, and end when this process does.

A child that ends with a code that only a person can mend (a damaged ledger, a wrong key file) ends everything with that
code. Every other end is followed by a new start, after 1 s, 2 s, 4 s ... 15 s, for as long as it takes: the link may
refuse a node for a minute. Imports no torch and no flwr. Out of scope: what the children do.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import final

from common.errors import ExitCode, StorageError
from common.files import make_folder, write_atomic
from common.passphrase import Passphrase

LOG = logging.getLogger("fedmedgan.start")

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 15.0
STEADY_S = 60.0
"""A child that ran for so long is started anew at once when it ends."""
GRACE_S = 20.0
"""What a child gets to end by itself; a kill loses no more than the round under way."""
# ENROLMENT: a child has it only where nothing is joined any more, and who has left is not to be started for ever. A
# site that the link refuses (revoked, or its new node key waits for `join`) ends with FEDERATION and is tried again.
FOR_A_PERSON = frozenset(
    {
        ExitCode.USAGE,
        ExitCode.CONFIG,
        ExitCode.DATA,
        ExitCode.PRIVACY,
        ExitCode.RESUME,
        ExitCode.STORAGE,
        ExitCode.MISSING_EXTRA,
        ExitCode.WIRE,
        ExitCode.PASSPHRASE,
        ExitCode.ENROLMENT,
    }
)
_LOOK_S = 0.1


@final
@dataclass
class Child:
    """A process to keep running.

    Attributes:
        name: For the log and `status`.
        command: What is started; its standard input is a pipe that closes when this process ends.
        again: What the command gets beside it from the second start on.
        passphrase: Written into a second pipe at each start, whose number the command gets as `--passphrase-fd`.
    """

    name: str
    command: Sequence[str]
    passphrase: Passphrase | None = None
    again: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    wait_s: float = FIRST_WAIT_S
    due: float = 0.0
    started: float = 0.0
    last_code: int | None = None


def agent_command(home: Path, socket: Path) -> list[str]:
    """Return the command of an agent that ends with its supervisor."""
    return [*_TETHERED, "client.cli", "serve", str(home), "--socket", str(socket)]


def relay_command(home: Path, socket: Path) -> list[str]:
    """Return the command of a relay that ends with its supervisor."""
    return [*_TETHERED, "client.operate", "relay", str(home), "--socket", str(socket)]


# -P: a folder `client` where this is started from is not ours
_TETHERED = (sys.executable, "-P", "-m", "client.tether")


def supervise(children: Sequence[Child], state: Path, stop: threading.Event) -> int:
    """Keep the children running until `stop` is set or one ends with a code for a person.

    Args:
        children: In the order of their start; they are stopped in the reverse order.
        state: A file that says how they are, for `status`.
        stop: Ends them and then this.

    Returns:
        0 when stopped, or the code for a person.

    Guarantees:
        - starts_anew: A child that is killed is running again after its wait.
        - leaves_nobody: No child runs when this returns.
        - disk_may_be_full: A state that cannot be written ends nothing.
    """
    make_folder(state.parent, 0o700)
    try:
        while not stop.is_set():
            for child in children:
                if _look_after(child):
                    _write(children, state)
                if child.process is None and child.last_code in FOR_A_PERSON:
                    LOG.error(
                        "%s ended with code %d, which a person must mend: see its log", child.name, child.last_code
                    )
                    return int(child.last_code or 0)
            stop.wait(_LOOK_S)
        return ExitCode.OK
    finally:
        _end([child for child in reversed(children) if child.process is not None])
        _write(children, state)


def _look_after(child: Child) -> bool:
    """Start the child or note its end; return whether anything changed."""
    now = time.monotonic()
    if child.process is None:
        if now < child.due:
            return False
        child.process = _start(child)
        child.starts, child.started = child.starts + 1, now
        LOG.info("%s started, process %d", child.name, child.process.pid)
        return True
    code = child.process.poll()
    if code is None:
        return False
    _close(child.process)
    steady = now - child.started > STEADY_S
    wait_s = FIRST_WAIT_S if steady else child.wait_s
    child.process, child.last_code, child.due = None, code, now + wait_s
    child.wait_s = min(2 * wait_s, LONGEST_WAIT_S)
    LOG.warning("%s ended with code %d; it is started anew in %.0f s", child.name, code, wait_s)
    return True


def _start(child: Child) -> subprocess.Popen[bytes]:
    command = [*child.command, *(child.again if child.starts else ())]
    if child.passphrase is None:
        return subprocess.Popen(command, stdin=subprocess.PIPE)
    reading, writing = os.pipe()
    try:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(child.passphrase.to_bytes())  # shorter than what a pipe holds: nobody has to read yet
        command += ["--passphrase-fd", str(reading)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(reading,))
    finally:
        os.close(reading)


def _end(children: Sequence[Child]) -> None:
    for child in children:
        if child.process is not None:
            child.process.terminate()
    deadline = time.monotonic() + GRACE_S
    for child in children:
        if child.process is None:
            continue
        try:
            child.process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            LOG.warning("%s did not end in %.0f s: killed", child.name, GRACE_S)
            child.process.kill()
            child.process.wait()
        _close(child.process)
        LOG.info("%s stopped", child.name)
        child.process = None


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _write(children: Sequence[Child], state: Path) -> None:
    values = {
        child.name: {
            "pid": child.process.pid if child.process else None,
            "starts": child.starts,
            "code": child.last_code,
        }
        for child in children
    }
    time_ = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        write_atomic(state, (json.dumps({"pid": os.getpid(), "time": time_, **values}) + "\n").encode(), 0o600)
    except StorageError as error:  # a full disk: `status` is behind, and the children are kept all the same
        LOG.error("%s", error)
