"""Agent and relay as two users, the agent without a network: a federation completes; the relay reads nothing of it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from client.cli import main as site_main
from client.home import Home
from common.config_text import build_config, to_toml
from common.crypto import load_key, save_key
from common.files import write_atomic
from common.passphrase import Passphrase
from server.cli import main as coordinator_main
from server.consortium import load_consortium
from tests.coordinator_home import free_port, wait_until_up
from tests.e2e.conftest import ENVIRONMENT
from tests.e2e.plain_link import ROOT
from tests.tiny_site import PROPOSAL, make_home

TOOLS = ("unshare", "setpriv")


def _may_separate() -> bool:
    if os.geteuid() != 0 or not all(map(shutil.which, TOOLS)):
        return False
    return subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not _may_separate(), reason="needs root, unshare and setpriv"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what Flower uses
]

AGENT_USER, RELAY_USER, SHARED_GROUP = "12345", "12346", "4321"
# The interpreter may stand where only root can read: the agent's user is given that, and nothing more.
_SEARCH = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
_AGENT = ["setpriv", "--reuid", AGENT_USER, "--regid", AGENT_USER, "--groups", SHARED_GROUP, *_SEARCH]
AS_AGENT = ["unshare", "-n", *_AGENT]
_NO_POWERS = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
_RELAY = ["setpriv", "--reuid", RELAY_USER, "--regid", RELAY_USER, "--groups", SHARED_GROUP, *_NO_POWERS]
WORDS = "correct horse battery staple"


def as_relay(environment: dict[str, str]) -> tuple[list[str], str]:
    """Return how the relay's user is become, and its number.

    Where the interpreter can be read by root alone, it is root's number without any of root's powers: that may read
    what is its own, like every user, and nothing of the agent's.
    """
    tried = subprocess.run([*_RELAY, sys.executable, "-c", "import cryptography, client"], env=environment, cwd=ROOT)
    if tried.returncode == 0:
        return _RELAY, RELAY_USER
    return ["setpriv", "--groups", SHARED_GROUP, *_NO_POWERS], "0"


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


FLOOD = """
import dataclasses, json, socket, sys, time
from pathlib import Path
from client.channel import connect, pack_request
from common.messages import Kind, Request
path, proposal = Path(sys.argv[1]), Path(sys.argv[2]).read_text()
ask, codes, started, held = connect(path, 60.0), set(), time.monotonic(), []
for number in range(100):
    question = Request(Kind.WARMUP, f"own-{number}", 0, proposal, {"look": "public"})
    codes.add(ask(question).refusal)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as half:
        half.connect(str(path))
        half.sendall(pack_request(question)[:-3])
print(json.dumps([sorted(map(str, codes)), time.monotonic() - started]))
"""


@contextmanager
def process(
    command: Sequence[str | Path], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("w") as out:
        line = list(map(str, command))
        started = subprocess.Popen(line, env=environment or ENV, cwd=ROOT, stdout=out, stderr=out)
        try:
            yield started
        except BaseException:
            print(log.read_text())
            raise
        finally:
            started.terminate()
            try:
                started.wait(40)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()


ENV = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "USER": "agent", "HOME": "/nonexistent"}
PYTHON = [sys.executable, "-m"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a call of a command in this process: what it printed, if it ended well."""

    def call(main: Callable[[list[str]], object], *arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert ended.value.code == 0, said.err
        return said.out

    return call


def joined_site(folder: Path, say: Callable[..., str]) -> Home:
    """Make a coordinator's home and a site that has joined it, by the commands that people type."""
    hub, home = folder / "hub", make_home(folder)
    ports = ("--port", free_port(), "--control-port", free_port())
    say(coordinator_main, "init", hub, "--host", "127.0.0.1", "--name", "lungs", *ports)
    files = (folder / "enrolment.json", folder / "invitation.json")
    shown = say(site_main, "enrol", home.folder, "--out", files[0])
    said = say(coordinator_main, "enrol", hub, files[0], "--out", files[1], "--words", words(shown, "this site"))
    say(site_main, "join", home.folder, files[1], "--words", words(said, "the coordinator"))
    return home


def words(text: str, of: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"words of {of}")]
    return line.split(": ")[1]


def hand_over(folder: Path, user: str, **files: bytes) -> dict[str, str]:
    """Give a service its credentials as a service manager does: a folder that no other user can enter."""
    folder.mkdir(mode=0o700)
    for name, content in files.items():
        write_atomic(folder / name.replace("_", "."), content, 0o400)
    subprocess.run(["chown", "-R", f"{user}:{user}", str(folder)], check=True)
    return {**ENV, "CREDENTIALS_DIRECTORY": str(folder)}


def refused(user: Sequence[str], paths: Sequence[Path]) -> list[str]:
    command = [*user, sys.executable, "-c", PROBE, *map(str, paths)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=ROOT, check=True).stdout)


def flood(user: Sequence[str], socket: Path, proposal: Path) -> tuple[list[str], float]:
    """Ask in the relay's name what no coordinator signed; return the codes and how long it took."""
    proposal.write_text(PROPOSAL.proposal())
    command = [*user, sys.executable, "-c", FLOOD, str(socket), str(proposal)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=ROOT, check=True).stdout)


def private_files(home: Home, data: Path, credentials: Path, pid: int) -> list[Path]:
    """Return what the relay's user must not read: data, keys, policy, ledger, journal, replies, log, memory."""
    books = [*home.ledger.iterdir(), *home.journal.iterdir(), *home.replies.iterdir()]
    images = [data, *home.folder.glob("vault-*/manifest"), home.folder / "keys" / "vault.json"]
    assert len(books) >= 7
    assert len(images) == 3
    memory = [Path(f"/proc/{pid}/mem"), Path(f"/proc/{pid}/environ")]
    files = [home.key, home.node_key, home.policy, home.federation, home.log, credentials / "passphrase"]
    return [*images, *files, *books, *memory]


def test_a_federation_completes_across_the_boundary(folder: Path, say: Callable[..., str]) -> None:
    """A real coordinator, a relay of another user, an agent without an interface: a generator, and nothing is read."""
    home, hub, data = joined_site(folder, say), folder / "hub", folder / "images.npz"
    save_key(home.key, load_key(home.key), Passphrase(WORDS))
    for path in (home.folder, data):
        subprocess.run(["chown", "-R", f"{AGENT_USER}:{AGENT_USER}", str(path)], check=True)
    data.chmod(0o600)
    relay_user, number = as_relay(ENV)
    relays, shared = folder / "relay", folder / "shared"
    relays.mkdir(mode=0o700)
    os.chown(relays, int(number), int(number))
    shared.mkdir()
    os.chown(shared, int(AGENT_USER), int(SHARED_GROUP))
    shared.chmod(0o2750)
    socket, run = shared / "agent.sock", hub / "runs" / "run-0001"
    handed = {"node_key": home.node_key.read_bytes(), "federation_json": home.federation.read_bytes()}
    own = hand_over(folder / "of-relay", number, **handed)
    agents = hand_over(folder / "of-agent", AGENT_USER, passphrase=WORDS.encode())
    write_atomic(folder / "run.toml", to_toml(build_config(PROPOSAL.model_dump(), RUN)).encode())
    serve = [*AS_AGENT, *PYTHON, "client.cli", "serve", home.folder, "--socket", socket]
    relay = [*relay_user, *PYTHON, "client.entry", "relay", relays, "--socket", socket]
    with ExitStack() as running:
        running.enter_context(process([*PYTHON, "server.cli", "start", hub], folder / "hub.txt"))
        agent = running.enter_context(process(serve, folder / "agent.txt", agents))
        wait_until_up(load_consortium(hub))
        running.enter_context(process(relay, folder / "relay.txt", own))
        command = [*PYTHON, "server.cli", "run", hub, folder / "run.toml"]
        with process(command, folder / "run.txt") as asked:
            assert asked.wait(200) == 0
        interfaces = Path(f"/proc/{agent.pid}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
        secret = private_files(home, data, folder / "of-agent", agent.pid)
        assert refused(relay_user, secret) == [str(path) for path in secret]
        assert refused(_AGENT, secret) == []
        assert refused(relay_user, [folder / "of-relay" / "node.key"]) == []
        codes, seconds = flood(relay_user, socket, folder / "proposal.json")
        print(f"\n200 connections of a broken-in relay took {seconds:.1f} s")
        assert codes == ["bad-request"]
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [list(line["sites"]) for line in rounds] == [["st-mary"]] * 3
    assert (run / "generator.safetensors").exists()
    assert "verified; 3 releases" in say(site_main, "journal", "verify", home.folder)
    assert sorted(path.name for path in relays.iterdir()) == ["logs"]


RUN = {
    "warmup.steps": 5,
    "warmup.batch_size": 8,
    "federation.rounds": 2,
    "federation.connect_timeout_s": 60.0,
    "federation.round_timeout_s": 60.0,
    "performance.threads": 1,
}
