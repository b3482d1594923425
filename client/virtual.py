"""Agents for `flwr run .` on Flower's simulation runtime, where a node is a partition number and nothing else.

Each partition's virtual hospital is a process of its own (`python -m simulations.agent`) behind a Unix socket, as at a
real site; it ends with the process that started it. At a hospital this module is never reached: there the node's own
configuration names the socket.
"""

import atexit
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from client.channel import Transport, connect
from common.flower_run import run_path

START_TIMEOUT_S = 600.0
_agents: dict[Path, subprocess.Popen[bytes]] = {}


def find_agent(node_config: Mapping[str, object], run_config: Mapping[str, object], run_id: int) -> Transport:
    """Return the transport to a partition's virtual hospital, started when it is not yet there.

    Raises:
        OSError: This is no simulation and the node's configuration names no agent, or the agent did not start.
    """
    partition, out = node_config.get("partition-id"), run_path(run_config.get("out"), run_id).absolute()
    if not isinstance(partition, int):
        raise OSError("Expected agent-socket in the node's configuration (flower-supernode --node-config).")
    path = _socket_path(out, partition)
    agent = _agents.get(path)
    if agent is None or agent.poll() is not None:
        _agents[path] = _start(path, out, partition)
    return connect(path, timeout_s=3600.0)


def _socket_path(out: Path, partition: int) -> Path:
    # A Unix socket's path holds at most 107 bytes, so it does not stand in the run folder.
    name = hashlib.sha256(f"{out}/{os.getpid()}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fedmedgan-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{partition}.sock"


def _start(path: Path, out: Path, partition: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "simulations.agent", str(out), str(partition), str(path)]
    agent = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=out)  # its stdin closes when this process ends
    atexit.register(agent.terminate)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not path.exists():
        if agent.poll() is not None or time.monotonic() > deadline:
            raise OSError(f"The virtual hospital of partition {partition} did not start; its log is in the run folder.")
        time.sleep(0.1)
    return agent
