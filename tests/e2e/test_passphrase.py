"""An identity key under a passphrase on a real terminal: `start` asks once, and no process shows what was typed."""

import fcntl
import os
import pty
import select
import signal
import socket as sockets
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from client.home import Home
from common.crypto import is_sealed
from tests.e2e.conftest import ENVIRONMENT
from tests.e2e.plain_link import ROOT, wait_for
from tests.pinned import pin
from tests.tiny_site import make_home

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(120)]

WORDS = "correct horse battery staple"


class Terminal:
    """A command at a terminal of its own, and what it has shown there."""

    def __init__(self, *arguments: str | Path) -> None:
        self.shown, (self.screen, keyboard) = "", pty.openpty()
        command = [sys.executable, "-m", "client.entry", *map(str, arguments)]
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdin=keyboard,
            stdout=keyboard,
            stderr=keyboard,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(keyboard)

    def read(self, until: Callable[[str], bool], seconds: float = 60) -> None:
        """Read until the condition holds or the other side is closed."""
        deadline = time.monotonic() + seconds
        while not until(self.shown):
            assert time.monotonic() < deadline, self.shown
            if select.select([self.screen], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.screen, 4096).decode(errors="replace")
                except OSError:
                    return

    def answer(self, prompt: str) -> None:
        """Wait for a prompt, then type the passphrase."""
        self.read(lambda shown: prompt in shown)
        assert prompt in self.shown
        time.sleep(0.1)  # the echo goes off with the prompt
        os.write(self.screen, f"{WORDS}\n".encode())

    def end(self) -> int:
        self.read(lambda _: False)
        os.close(self.screen)
        return self.process.wait(10)


def test_start_asks_once_and_hands_it_on(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Set on a terminal, asked once by `start`; an agent that is killed is back without a question."""
    home = make_home(tmp_path)
    pin(home)
    setting = Terminal("passphrase", home.folder)
    setting.answer("New passphrase")
    setting.answer("The same again")
    assert setting.end() == 0
    assert is_sealed(home.key)
    socket = tmp_path_factory.mktemp("s") / "s"
    start = Terminal("start", home.folder, "--socket", socket)
    try:
        start.answer("Passphrase of this site")
        wait_for(socket.is_socket, 60, "the agent")
        agent = agent_of(home)
        os.kill(agent.pid, signal.SIGKILL)
        wait_for(lambda: (one := agent_of(home)) and one.pid != agent.pid, 60, "another agent")
        wait_for(lambda: answers(socket), 60, "the agent again")
        processes = [psutil.Process(start.process.pid), *psutil.Process(start.process.pid).children()]
        assert len(processes) >= 2
        for process in processes:
            shown = [*process.cmdline(), *process.environ().values()]
            assert WORDS not in " ".join(shown)
    finally:
        start.process.terminate()
    assert start.end() == 0
    assert start.shown.count("Passphrase of this site") == 1
    told = start.shown + setting.shown + "".join(path.read_text() for path in home.log.parent.glob("*.log"))
    assert WORDS not in told


def agent_of(home: Home) -> psutil.Process | None:
    wanted = {"serve", str(home.folder)}
    found = [p for p in psutil.process_iter(["cmdline"]) if wanted <= set(p.info["cmdline"] or ())]
    return found[0] if found else None


def answers(socket: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        return probe.connect_ex(str(socket)) == 0
