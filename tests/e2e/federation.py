"""Three hospitals and a coordinator on this machine, as they are run: typed commands, real processes, real files."""

import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from client import journal
from client.entry import main as site_main
from client.ledger import read_ledger
from client.paths import Home
from common.artefact import load_generator
from common.config_text import build_config, to_toml
from common.crypto import load_key
from common.files import write_atomic
from common.flower_environment import flower_environment
from common.messages import Kind
from server.cli import main as coordinator_main
from server.consortium import load_consortium
from server.rounds import initial_pair
from server.start import save_start
from tests.coordinator_home import ROOT, end, free_port, wait_until_up
from tests.e2e.x_rays import CLASSES, PATIENTS, write_hospitals

T = TypeVar("T")
SITES = ("st-anne", "st-john", "st-mary")
RUN: dict[str, object] = {
    "image.size": 28,
    "image.classes": CLASSES,
    "model.name": "mlp",
    "model.latent_dim": 4,
    "model.generator_width": 8,
    "model.discriminator_width": 8,
    "privacy.epsilon": 8.0,
    "privacy.batch_patients": 8,
    "warmup.steps": 5,
    "warmup.batch_size": 8,
    "train.steps_per_round": 2,
    "train.generator_batch": 4,
    "federation.rounds": 6,
    "federation.connect_timeout_s": 60.0,
    "federation.round_timeout_s": 60.0,
    "performance.threads": 1,
}
COMMANDS = {"site": "client.entry", "coordinator": "server.cli"}


class Federation:
    """Folders, commands and processes of one coordinator and its sites."""

    def __init__(self, folder: Path, site_proxy: str = "", hub_proxy: str = "", sites: tuple[str, ...] = SITES) -> None:
        self.sites = sites
        self.folder, self.hub = folder, folder / "hub"
        self.run = self.hub / "runs" / "run-0001"
        self.site_proxy, self.hub_proxy = site_proxy, hub_proxy
        self.running = ExitStack()
        self.services: dict[str, subprocess.Popen[str]] = {}

    def home(self, site: str) -> Path:
        return self.folder / site

    def command(self, who: str, *arguments: object, code: int = 0) -> str:
        """Run a command as it is typed and return what it printed.

        In a process of its own, but for what is typed before anything runs: there the seconds of importing torch are
        paid once.
        """
        given = [str(argument) for argument in arguments]
        ended, said = _in_a_process(self.folder, who, given) if self.services else _in_this_process(who, given)
        assert ended == code, f"{who} {' '.join(given)}: {ended}\n{said}"
        return said

    def found(self, size: int = 28) -> None:
        """Write the images, make all homes, enrol and join."""
        write_hospitals([self.folder / f"images-{site}" for site in self.sites])
        ports = ("--port", free_port(), "--control-port", free_port())
        self.command("coordinator", "init", self.hub, "--host", "127.0.0.1", "--name", "lungs", *ports)
        for site in self.sites:
            images = self.folder / f"images-{site}"
            self.command("site", "init", self.home(site), "--name", site, "--data", images, "--patients", PATIENTS)
            said = self.command("site", "import", self.home(site), "--classes", ",".join(CLASSES), "--size", size)
            assert f"of {PATIENTS} patients" in said
            assert "refused: nothing" in said
            self.enrol(site)

    def enrol(self, site: str, hub: Path | None = None) -> None:
        """Exchange the two files; both sides type the words that the other reads to them."""
        files = (self.folder / f"{site}.enrolment.json", self.folder / f"{site}.invitation.json")
        shown = self.command("site", "enrol", self.home(site), "--out", files[0])
        heard = ("--words", _words(shown, "this site"))
        said = self.command("coordinator", "enrol", hub or self.hub, files[0], "--out", files[1], *heard)
        self.command("site", "join", self.home(site), files[1], "--words", _words(said, "the coordinator"))

    def start_coordinator(self) -> None:
        self._start("hub", "coordinator", "start", self.hub)
        wait_until_up(load_consortium(self.hub))

    def start_site(self, site: str) -> None:
        """As systemd would, also after the process was killed."""
        self._start(site, "site", "start", self.home(site))

    def launch(self, who: str, *arguments: object, proxy: str = "", log: str = "out.log") -> subprocess.Popen[str]:
        """Start a command and leave it running."""
        environment = flower_environment(self.folder, local=False)
        environment |= {"PYTHONPATH": str(ROOT), "NO_PROXY": "", "no_proxy": ""}
        names = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY")
        environment |= dict.fromkeys(names, proxy) if proxy else {}
        line = [sys.executable, "-m", COMMANDS[who], *map(str, arguments)]
        with (self.folder / log).open("a") as out:
            return subprocess.Popen(line, env=environment, cwd=ROOT, text=True, stdout=out, stderr=out)

    def _start(self, name: str, who: str, *arguments: object) -> None:
        proxy = self.site_proxy if who == "site" else self.hub_proxy
        process = self.launch(who, *arguments, proxy=proxy, log=f"{name}.log")
        self.services[name] = process
        self.running.callback(end, process, 60)

    def end(self) -> None:
        """End everything that runs."""
        self.running.close()
        self.services.clear()

    def write_config(self, changes: dict[str, object] | None = None) -> Path:
        path = self.folder / "run.toml"
        settings = {key: value for key, value in {**RUN, **(changes or {})}.items() if value is not None}
        write_atomic(path, to_toml(build_config({}, settings)).encode())
        return path

    def write_start(self) -> Path:
        """Write a generator to start from, as `fedmedgan-simulate pretrain` does, but of random weights."""
        config, path = build_config({}, RUN), self.folder / "public"
        save_start(path, initial_pair(config).generator, config)
        return path

    def start_run(self, changes: dict[str, object] | None = None, *options: object) -> subprocess.Popen[str]:
        config = self.write_config(changes)
        process = self.launch("coordinator", "run", self.hub, config, *options, proxy=self.hub_proxy)
        self.running.callback(end, process, 60)
        return process

    def resume(self) -> subprocess.Popen[str]:
        process = self.launch("coordinator", "resume", self.hub, self.run, proxy=self.hub_proxy)
        self.running.callback(end, process, 60)
        return process

    def records(self) -> list[dict]:
        """Return the rounds that are real so far."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def processes(self, *wanted: object) -> list[psutil.Process]:
        """Return the processes whose command line holds all of these words."""
        words = {str(word) for word in wanted}
        found = [(one, one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
        return [one for one, line in found if words <= set(line)]

    def said(self) -> str:
        """Return the end of everything that was printed or logged anywhere."""
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*/logs/*.log")])
        ends = {path.relative_to(self.folder): path.read_text().splitlines()[-30:] for path in logs}
        return "\n".join(f"--- {path}\n" + "\n".join(lines) for path, lines in ends.items())


@contextmanager
def federation(site_proxy: str = "", hub_proxy: str = "", sites: tuple[str, ...] = SITES) -> Iterator[Federation]:
    """Make a federation in a folder with a short path (a socket's path holds 107 bytes); end and delete all of it."""
    folder = Path(tempfile.mkdtemp())
    made = Federation(folder, site_proxy, hub_proxy, sites)
    try:
        with made.running:
            yield made
    finally:
        shutil.rmtree(folder)


def wait_for(condition: Callable[[], T], seconds: float, what: str) -> T:
    """Return the condition's value as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)
    return value


def check_result(made: Federation, rounds: int) -> None:
    """End everything, then check that the generator draws, and that all parties' records agree, digest by digest."""
    made.end()
    generator, info = load_generator(made.run)
    assert info.image.classes == CLASSES
    with torch.no_grad():
        images = generator(torch.randn(4, info.model.latent_dim), torch.tensor([0, 1, 0, 1]))
    assert torch.isfinite(images).all()
    records = made.records()
    assert [record["round"] for record in records] == list(range(rounds + 1))
    for site in made.sites:
        received = {record["round"]: record["sites"][site]["sha256"] for record in records if site in record["sites"]}
        lost = _check_books(made, site, received)
        print(f"{site}: {len(received)} replies received, each as its journal has it; {lost} released and not used")


def _check_books(made: Federation, site: str, received: dict[int, str]) -> int:
    made.command("site", "journal", "verify", made.home(site))
    assert "verified" in made.command("site", "ledger", made.home(site))
    home = Home(made.home(site))
    key = load_key(home.key).verify_key
    entries = [entry for entry in journal.entries(home.journal, key) if entry.kind is not Kind.HELLO]
    released = {entry.round: entry.sha256 for entry in entries}
    assert len(released) == len(entries)
    assert received
    assert received.items() <= released.items()
    charged = Counter(entry.request.round for entry in read_ledger(home.ledger, key).entries)
    assert set(charged.values()) == {1}
    assert released.keys() <= charged.keys()
    return len(released) - len(received)


def _in_this_process(who: str, given: list[str]) -> tuple[int, str]:
    said, main = io.StringIO(), {"site": site_main, "coordinator": coordinator_main}[who]
    with redirect_stdout(said), redirect_stderr(said):
        try:
            main(given)
        except SystemExit as ended:
            return int(ended.code or 0), said.getvalue()
    raise RuntimeError("a command ends by SystemExit")


def _in_a_process(folder: Path, who: str, given: list[str]) -> tuple[int, str]:
    environment = flower_environment(folder) | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", COMMANDS[who], *given]
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def _words(text: str, of: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"words of {of}")]
    return line.split(": ")[1]
