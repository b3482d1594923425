"""A coordinator and its sites as they are deployed, on loopback: made by the commands that people type, then run.

TLS, node keys, signatures, supervisors, agents and relays in processes of their own; patients are phantoms. Out of
scope: what is measured (benchmark/deployment).
"""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import psutil

import simulations
from client import policy
from client.entry import main as site_command
from client.paths import Home
from common.config_text import build_config, to_toml
from common.errors import FederationError
from common.files import make_folder, write_atomic
from common.flower_environment import flower_environment
from server.cli import main as coordinator_command
from server.consortium import load_consortium, read_settings
from simulations.benchmark import stopwatch
from simulations.phantoms.anatomy import render
from simulations.phantoms.cohort import CLASSES, draw_patients, draw_scanner

ROOT = Path(simulations.__file__).parents[1]
SITES = ("st-anne", "st-john", "st-mary")
PATIENTS = 40
STARTED_S, STOPPED_S, LOOK_S = 600.0, 60.0, 0.1
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY")


@final
@dataclass(frozen=True)
class Deployment:
    """A federation on loopback.

    Attributes:
        folder: Holds the homes; a short path, for that of a socket has few bytes.
        spans: What the stopwatches write.
    """

    folder: Path
    spans: Path

    @property
    def hub(self) -> Path:
        """The coordinator's home."""
        return self.folder / "hub"

    def site(self, name: str) -> Path:
        """A site's home."""
        return self.folder / name


def found(folder: Path, size: int, max_reply_bytes: int) -> Deployment:
    """Make a coordinator's home and joined sites with phantoms.

    Args:
        folder: Where; made.
        size: Pixels along each side of an image.
        max_reply_bytes: Of the sites' policies.
    """
    made = Deployment(make_folder(folder), make_folder(folder / "spans"))
    ports = ("--port", _free_port(), "--control-port", _free_port())
    _say(coordinator_command, "init", made.hub, "--host", "127.0.0.1", "--name", "bench", *ports)
    for number, name in enumerate(SITES):
        home, data = made.site(name), folder / f"{name}.npz"
        _write_phantoms(data, number, size)
        _say(site_command, "init", home, "--name", name, "--data", data, "--patients", PATIENTS)
        rules = policy.load(Home(home).policy)
        policy.save(Home(home).policy, rules.model_copy(update={"max_reply_bytes": max_reply_bytes}))
        _say(site_command, "import", home, "--classes", ",".join(CLASSES), "--size", size)
        asked, invited = folder / f"{name}.enrolment.json", folder / f"{name}.invitation.json"
        shown = _words(_say(site_command, "enrol", home, "--out", asked), "this site")
        said = _say(coordinator_command, "enrol", made.hub, asked, "--out", invited, "--words", shown)
        _say(site_command, "join", home, invited, "--words", _words(said, "the coordinator"))
    return made


@contextlib.contextmanager
def running(made: Deployment, proxy: str = "", constants: str = "{}") -> Generator[dict[str, psutil.Process]]:
    """Start coordinator and sites; yield their processes by role once all relays are connected and all agents listen.

    Args:
        made: The homes.
        proxy: Between the relays and the coordinator; empty: none.
        constants: What the stopwatch sets (`stopwatch.CONSTANTS`).

    Raises:
        FederationError: Somebody did not start.
    """
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(_started(made, constants, "", "server.cli", "start", made.hub))
        port = read_settings(load_consortium(made.hub)).port
        _wait(lambda: _listens(port), "the coordinator to listen")
        starts = [
            stack.enter_context(_started(made, constants, proxy, "client.entry", "start", made.site(name)))
            for name in SITES
        ]
        states = [Home(made.site(name)).relay_state for name in SITES]
        _wait(lambda: all(path.exists() and _contact(path) for path in states), "the relays to connect")
        _wait(lambda: all(Home(made.site(name)).socket.exists() for name in SITES), "the agents to listen")
        roles = {"link": _child(hub.pid, "server.link"), "executor": _child(hub.pid, "server.executor")}
        for name, started in zip(SITES, starts, strict=True):
            roles |= {f"agent {name}": _child(started.pid, "serve"), f"relay {name}": _child(started.pid, "relay")}
        yield roles


def start_run(
    made: Deployment, changes: Mapping[str, object], constants: str
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """Start a run of a configuration, and follow it."""
    write_atomic(made.folder / "run.toml", to_toml(build_config({}, dict(changes))).encode())
    return _started(made, constants, "", "server.cli", "run", made.hub, made.folder / "run.toml")


def run_of(executor: psutil.Process) -> psutil.Process | None:
    """Return the process of the run that the executor started, if there is one."""
    with contextlib.suppress(psutil.Error):
        return next(iter(executor.children()), None)
    return None


def said(made: Deployment) -> str:
    """Return what all commands printed."""
    return (made.folder / "out.log").read_text(errors="replace")


@contextlib.contextmanager
def _started(made: Deployment, constants: str, proxy: str, *command: str | Path) -> Generator[subprocess.Popen[bytes]]:
    with (made.folder / "out.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            env=_environment(made, constants, proxy),
            cwd=made.folder,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOPPED_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment(made: Deployment, constants: str, proxy: str) -> dict[str, str]:
    hook = make_folder(made.folder / "hook")
    write_atomic(hook / "sitecustomize.py", b"from simulations.benchmark.stopwatch import wind\n\nwind()\n")
    environment = flower_environment(made.folder, local=not proxy)
    environment |= {"PYTHONPATH": os.pathsep.join((str(hook), str(ROOT)))}
    environment |= {stopwatch.FOLDER: str(made.spans), stopwatch.CONSTANTS: constants}
    return environment | (dict.fromkeys(PROXIES, proxy) | {"NO_PROXY": "", "no_proxy": ""} if proxy else {})


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + STARTED_S
    while not condition():
        if time.monotonic() > deadline:
            raise FederationError(f"Waited {STARTED_S:.0f} s for {what}; the logs say why it took longer.")
        time.sleep(LOOK_S)


def _contact(state: Path) -> bool:
    """Tell whether a relay of this start has talked to the link: one that runs now wrote the file."""
    try:
        values = json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return psutil.pid_exists(int(values["pid"])) and bool(values["node"])


def _child(parent: int, word: str) -> psutil.Process:
    children = psutil.Process(parent).children()
    (found_,) = [child for child in children if word in child.cmdline()]
    return found_


def _write_phantoms(path: Path, seed: int, size: int) -> None:
    patients, scanner = draw_patients(PATIENTS, seed), draw_scanner(seed, seed)
    drawn = np.stack([render(patient, 0, scanner, size) for patient in patients])
    scaled = (drawn - drawn.min()) / max(float(np.ptp(drawn)), 1e-6)
    names = np.array([patient.patient_id for patient in patients])
    labels = np.array(CLASSES)[[patient.label for patient in patients]]
    np.savez(path, images=(255 * scaled).astype(np.uint8), patient_id=names, labels=labels)


def _say(command: Callable[[list[str]], object], *arguments: object) -> str:
    """Call a command in this process; return what it printed."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            command([str(argument) for argument in arguments])
    except SystemExit as ended:
        if ended.code:
            raise FederationError(f"`{arguments[0]}` ended with {ended.code}: {out.getvalue()}") from None
    return out.getvalue()


def _words(text: str, of: str) -> str:
    return next(line.split(": ")[1] for line in text.splitlines() if line.startswith(f"words of {of}"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
