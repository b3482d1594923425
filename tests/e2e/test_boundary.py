"""Agent and relay as two users, the agent without a network: a site answers; the relay's user reads nothing of it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.home import Home
from tests.e2e.conftest import ENVIRONMENT
from tests.e2e.plain_link import ROOT, Link, answers, plain_link, wait_for, write_node_key
from tests.pinned import pin
from tests.tiny_site import make_home

TOOLS = ("unshare", "setpriv")


def _may_separate() -> bool:
    if os.geteuid() != 0 or not all(map(shutil.which, TOOLS)):
        return False
    return subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(not _may_separate(), reason="needs root, unshare and setpriv"),
]

AGENT_USER, SHARED_GROUP = "12345", "4321"
# The interpreter may stand where only root can read: the agent's user is given that, and nothing more.
_SEARCH = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
AS_AGENT = [
    "unshare",
    "-n",
    "setpriv",
    "--reuid",
    AGENT_USER,
    "--regid",
    AGENT_USER,
    "--groups",
    SHARED_GROUP,
    *_SEARCH,
]
# The relay is root's number without any of root's powers: it may read what is its own, like every user.
AS_RELAY = ["setpriv", "--groups", SHARED_GROUP, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]

PROBE = """
import json, sys
refused = []
for path in sys.argv[1:]:
    try:
        with open(path, "rb") as file:
            file.seek(0)
            file.read(1)
    except PermissionError:
        refused.append(path)
    except OSError as error:
        print(path, error, file=sys.stderr)
print(json.dumps(refused))
"""


@contextmanager
def process(command: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "USER": "agent", "HOME": "/nonexistent"}
    with log.open("w") as out:
        started = subprocess.Popen(list(map(str, command)), env=environment, cwd=ROOT, stdout=out, stderr=out)
        try:
            yield started
        except BaseException:
            print(log.read_text())
            raise
        finally:
            started.terminate()
            try:
                started.wait(20)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


def relay_home(folder: Path, link: Link) -> Home:
    """What the relay needs, and nothing else of a site."""
    home = Home(folder / "relay")
    home.node_key.parent.mkdir(parents=True)
    link.register(write_node_key(home.node_key))
    pin(home, link.port, link.ca)
    return home


def test_two_users_and_no_network(folder: Path, tmp_path: Path) -> None:
    (folder / "link").mkdir()
    with plain_link(folder / "link") as link:
        agents, relays = make_home(folder), relay_home(folder, link)
        subprocess.run(["chown", "-R", f"{AGENT_USER}:{AGENT_USER}", str(agents.folder)], check=True)
        shared = folder / "shared"
        shared.mkdir()
        os.chown(shared, int(AGENT_USER), int(SHARED_GROUP))
        shared.chmod(0o2770)
        socket = shared / "agent.sock"
        python = [sys.executable, "-m"]
        serve = [*AS_AGENT, *python, "client.cli", "serve", agents.folder, "--socket", socket]
        relay = [*AS_RELAY, *python, "client.entry", "relay", relays.folder, "--socket", socket]
        with process(serve, folder / "agent.txt") as agent, process(relay, folder / "relay.txt"):
            link.submit(["hello"], tmp_path / "out.json")
            (answer,) = answers(tmp_path / "out.json", 1, 60)
            assert answer["reply"]["fields"]["site"] == "st-mary"
            wait_for(socket.is_socket, 1, "the socket")
            interfaces = Path(f"/proc/{agent.pid}/net/dev").read_text().splitlines()[2:]
            assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
            secrets = [agents.key, agents.policy, agents.ledger / "ledger.head.json"]
            secrets += agents.folder.glob("vault-*/manifest")
            secrets += [Path(f"/proc/{agent.pid}/mem"), Path(f"/proc/{agent.pid}/environ")]
            assert len(secrets) == 6
            tried = subprocess.run(
                [*AS_RELAY, sys.executable, "-c", PROBE, *map(str, secrets)], capture_output=True, text=True
            )
            assert json.loads(tried.stdout) == [str(path) for path in secrets], tried.stderr
            own = subprocess.run(
                [*AS_RELAY, sys.executable, "-c", PROBE, str(relays.node_key)], capture_output=True, text=True
            )
            assert json.loads(own.stdout) == []
