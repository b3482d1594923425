"""kill -9 at any point of charge, train, journal and reply: nothing is released that was not charged, ever.

Agents are real processes on real homes. Four hundred die at random moments (FEDMEDGAN_KILLS=1000 for more), and one at
every durable call there is. After each death the home is read as it lies, then opened again; the same request is asked
until it is answered.
"""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import final

import pytest

from client import journal
from client.agent import open_site
from client.channel import pack_request, unpack_reply
from client.home import Home
from client.ledger import read_ledger
from client.site_config import head_copy
from client.verify import verify_home
from common.crypto import load_key
from common.errors import WireError
from common.messages import Kind, Reply, Request
from common.plan import plan
from common.seal import content_digest
from tests.e2e.conftest import ENVIRONMENT
from tests.e2e.nursery import Order, Outcome
from tests.tiny_site import POLICY, PROPOSAL, make_home, train_request, warmup_request

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("FEDMEDGAN_KILLS", "400"))
LONG = PROPOSAL.model_copy(update={"federation": PROPOSAL.federation.model_copy(update={"rounds": 6})})
REQUESTS = (warmup_request(proposal=LONG), *(train_request(number, proposal=LONG) for number in range(1, 7)))

Key = tuple[str, int, Kind]


@final
class Agents:
    """Starts agents, one at a time, and lets them die."""

    def __init__(self, folder: Path, warm_home: Home) -> None:
        """Start the process they are forked from and let it warm up on a home of its own."""
        self._frame, self._sent = folder / "request", folder / "reply"
        files = [folder / f"warm-{request.round}" for request in REQUESTS]
        for path, request in zip(files, REQUESTS, strict=True):
            path.write_bytes(pack_request(request))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.nursery", str(warm_home.folder), *map(str, files)],
            cwd=ROOT,
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "warm\n"

    def ask(
        self, home: Home, request: Request, kill_after_s: float | None = None, kill_at_call: int | None = None
    ) -> tuple[Outcome, bytes | None]:
        """Ask one agent; return what became of it, and its reply if all of it came."""
        self._frame.write_bytes(pack_request(request))
        order = Order(str(home.folder), str(self._frame), str(self._sent), kill_after_s, kill_at_call)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        outcome, sent = Outcome(**json.loads(self._line())), self._sent.read_bytes()
        try:
            unpack_reply(sent)
        except WireError:
            return outcome, None
        return outcome, sent

    def close(self) -> None:
        """End the warm process."""
        self._process.communicate(timeout=30)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def copy_of(home: Home, folder: Path) -> Home:
    """Copy a home, and the copy of its ledger's head that stands beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(home.folder, folder)
    shutil.copy(f"{home.folder}.head", f"{folder}.head")
    site = (folder / "site.toml").read_text()
    (folder / "site.toml").write_text(site.replace(f"{home.folder}.head", f"{folder}.head"))
    return Home(folder)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("template")
    return make_home(folder, head_copy=folder / "home.head")


@pytest.fixture(scope="module")
def agents(template: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    folder = tmp_path_factory.mktemp("agents")
    made = Agents(folder, copy_of(template, folder / "home"))
    yield made
    made.close()


def key_of(request: Request | Reply) -> Key:
    return request.run_id, request.round, request.kind


def stored_replies(home: Home) -> dict[Key, bytes]:
    """Read every stored reply; one that does not decode fails the test."""
    frames = [path.read_bytes().partition(b"\n")[2] for path in home.replies.glob("[!.]*.reply")]
    return {key_of(unpack_reply(frame)): frame for frame in frames}


def audit(home: Home, told: Mapping[Key, bytes], request: Request) -> str:
    """Read a home as a death left it, then open it again; return how far the request had come.

    Args:
        home: What the dead agent left.
        told: Every reply that left a site of this home, in full.
        request: What was asked last.
    """
    verify_key, agreed = load_key(home.key).verify_key, plan(LONG, POLICY.declared_patients)
    price = {Kind.WARMUP: agreed.charge_of_warmup(), Kind.TRAIN: agreed.charge_of_round(LONG.train.steps_per_round)}
    entries = read_ledger(home.ledger, verify_key, head_copy(home)).entries
    charged = [(entry.request.run_id, entry.request.round, entry.request.kind) for entry in entries]
    journaled = {
        (line.run_id, line.round, line.kind): line.sha256 for line in journal.entries(home.journal, verify_key)
    }
    stored = stored_replies(home)
    assert len(charged) == len(set(charged))
    assert all(entry.charge == price[entry.request.kind] for entry in entries)
    assert journaled.keys() | stored.keys() | told.keys() <= set(charged)
    assert {key: content_digest(unpack_reply(frame)) for key, frame in told.items()}.items() <= journaled.items()
    for key in stored.keys() & journaled.keys():
        assert content_digest(unpack_reply(stored[key])) == journaled[key]
    assert verify_home(home, verify_key).findings == ()
    for secret in home.replies.glob("[!.]*.secret"):
        assert len(secret.read_bytes()) == 32
    site = open_site(home)
    assert len(site.ledger.entries) == len(entries)
    assert site.ledger.spent(POLICY.delta) <= POLICY.max_epsilon
    key = key_of(request)
    stages = {"answered": told, "journaled": journaled, "stored": stored, "charged": charged}
    return next((stage for stage, keys in stages.items() if key in keys), "before the charge")


def restart(agents: Agents, home: Home, told: dict[Key, bytes], request: Request) -> float:
    """Ask again without a kill: an answer, the same one if there was one; return the seconds it took."""
    before = told.get(key_of(request)) or stored_replies(home).get(key_of(request))
    outcome, frame = agents.ask(home, request)
    assert frame is not None
    assert not outcome.killed
    assert unpack_reply(frame).refusal is None
    assert before in (None, frame)
    told[key_of(request)] = frame
    assert audit(home, told, request) == "answered"
    assert list(home.replies.glob("[!.]*.secret")) == []
    return outcome.seconds


def measure(agents: Agents, home: Home) -> dict[Kind, float]:
    """Measure how long an agent lives that is not killed."""
    told: dict[Key, bytes] = {}
    return {request.kind: restart(agents, home, told, request) for request in REQUESTS}


@pytest.mark.timeout(900)
def test_killed_at_random_moments(agents: Agents, template: Home, tmp_path: Path) -> None:
    """Half of the dead are asked again with another death waiting, half without."""
    moment, stages, told = random.Random(5), Counter[str](), dict[Key, bytes]()
    whole_s = measure(agents, copy_of(template, tmp_path / "measured"))
    home = copy_of(template, tmp_path / "home")
    for request in itertools.cycle(REQUESTS):
        if request is REQUESTS[0]:
            if stages.total() >= KILLS:
                break
            home, told = copy_of(template, tmp_path / "home"), {}
        fresh = True
        while True:
            outcome, frame = agents.ask(home, request, kill_after_s=moment.uniform(0.0, 1.1 * whole_s[request.kind]))
            assert outcome.killed
            if frame is not None:
                told[key_of(request)] = frame
            stage = audit(home, told, request)
            stages[stage] += 1
            fresh = fresh and stage == "before the charge"
            if stage == "answered" or moment.random() < 0.5:
                break
        seconds = restart(agents, home, told, request)
        if fresh:  # the machine may be slower or faster by now
            whole_s[request.kind] += 0.2 * (seconds - whole_s[request.kind])
    print(f"\n{stages.total()} kills: {dict(stages)}")
    for stage, part in {"before the charge": 0.02, "charged": 0.2, "answered": 0.02}.items():
        assert stages[stage] >= part * stages.total(), stages


@pytest.mark.parametrize("request_", REQUESTS[:2], ids=lambda request: request.kind.value)
def test_killed_at_every_durable_call(agents: Agents, template: Home, tmp_path: Path, request_: Request) -> None:
    """Two agents in turn die; a copy of what they left answers with the same bytes: nothing can be drawn twice."""
    base, told = copy_of(template, tmp_path / "base"), dict[Key, bytes]()
    for earlier in REQUESTS[: REQUESTS.index(request_)]:
        restart(agents, base, told, earlier)
    moment, stages, twins = random.Random(6), Counter[str](), 0
    for call in itertools.count():
        home, known = copy_of(base, tmp_path / "home"), dict(told)
        outcome, frame = agents.ask(home, request_, kill_at_call=call)
        if frame is not None:
            known[key_of(request_)] = frame
        if not outcome.killed:
            break
        stages[audit(home, known, request_)] += 1
        agents.ask(home, request_, kill_at_call=moment.randrange(call + 2))
        audit(home, known, request_)
        drawn = list(home.replies.glob("[!.]*.secret"))
        twin, known_to_twin = copy_of(home, tmp_path / "twin"), dict(known)
        restart(agents, home, known, request_)
        restart(agents, twin, known_to_twin, request_)
        if drawn:
            twins += 1
            assert known == known_to_twin
    print(f"\n{request_.kind}: {stages.total()} durable calls: {dict(stages)}; {twins} left a secret")
    assert twins >= 5
    assert set(stages) >= {"before the charge", "charged", "stored", "journaled"}
