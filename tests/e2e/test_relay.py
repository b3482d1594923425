"""A site under `fedmedgan-site start` against Flower's own link: agent and relay as processes, killed and restarted."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from client.home import Home
from common.errors import ExitCode
from tests.e2e.conftest import ENVIRONMENT
from tests.e2e.plain_link import ROOT, Link, answers, plain_link, wait_for, write_certificates, write_node_key
from tests.e2e.recording_proxy import recording_proxy
from tests.pinned import pin
from tests.tiny_site import make_home

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(180)]

SITE = [sys.executable, "-m", "client.entry"]
HEAVY = ("libtorch", "pydicom")


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    with plain_link(tmp_path_factory.mktemp("link")) as running:
        yield running


@pytest.fixture
def home(link: Link) -> Iterator[Home]:
    """A site that has joined; its folder is short, for a socket's path holds 107 bytes at most."""
    with tempfile.TemporaryDirectory() as folder:
        made = make_home(Path(folder))
        public = write_node_key(made.node_key)
        link.register(public)
        pin(made, link.port, link.ca)
        yield made


def site(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*SITE, *map(str, arguments)]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60)


def environment() -> dict[str, str]:
    return {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}


@contextmanager
def started(home: Home, **extra: str) -> Iterator[subprocess.Popen[str]]:
    command = [*SITE, "start", str(home.folder)]
    with (home.folder / "out.txt").open("w") as out:
        process = subprocess.Popen(command, env={**environment(), **extra}, cwd=ROOT, text=True, stdout=out, stderr=out)
        try:
            yield process
        except BaseException:
            for log in sorted((home.folder / "logs").glob("*.log")):
                print(f"--- {log.name}", log.read_text(), sep="\n")
            print((home.folder / "out.txt").read_text())
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def child(home: Home, name: str) -> int:
    """Wait until a child runs and return its process id."""
    return wait_for(lambda: _state(home).get(name, {}).get("pid"), 30, name)


def _state(home: Home) -> dict:
    return json.loads(home.start_state.read_text()) if home.start_state.exists() else {}


def test_a_site_answers_and_the_bundle_is_never_imported(link: Link, home: Home, tmp_path: Path) -> None:
    """Known requests get the agent's answer, others a code; a message costs less than 2 s beyond its work."""
    plan = ["hello"] * 5 + ["unknown", "garbage", "large", "unsigned", "foreign", "hello"]
    with started(home) as process:
        relay = psutil.Process(child(home, "relay"))
        wait_for(lambda: site("status", home.folder).returncode == ExitCode.OK, 30, "the link")
        idle = [psutil.Process(pid).memory_info().rss / 1e6 for pid in (relay.pid, process.pid)]
        link.submit(plan, tmp_path / "out.json")
        found = answers(tmp_path / "out.json", len(plan), 120)
        after = relay.memory_info().rss / 1e6
        print(f"\nmemory: relay idle {idle[0]:.0f} MB, after 20 MB of arrays {after:.0f} MB; start {idle[1]:.0f} MB")
        for answer in found:
            print(f"{answer['what']}: {answer['seconds']:.2f} s")
        mapped = {Path(part.path).name for part in relay.memory_maps()}
        assert not [name for name in mapped if name.startswith(HEAVY)]
        assert not [c for c in relay.net_connections() if c.status == psutil.CONN_LISTEN]
    assert [a["reply"]["fields"]["site"] for a in found if a["what"] == "hello"] == ["st-mary"] * 6
    by_name = {answer["what"]: answer for answer in found}
    assert (by_name["unknown"]["error"], by_name["unknown"]["reason"]) == (1, "unknown-request")
    assert by_name["garbage"]["reply"]["refusal"] == by_name["unsigned"]["reply"]["refusal"] == "bad-request"
    assert by_name["large"]["reply"]["refusal"] is not None
    for what in ("unsigned", "foreign"):  # of a coordinator without the pinned key
        assert by_name[what]["reply"] == {"refusal": "bad-request", "fields": {}}
    assert home.log.read_text().count("hello round 0 refused (bad-request)") == 2
    assert not (link.folder / "canary").exists()
    assert process.returncode == ExitCode.OK


def test_a_bundle_that_is_not_listed_is_refused(link: Link, home: Home, tmp_path: Path) -> None:
    home.bundles.write_text("# none of ours\n" + "0" * 64 + "\n")
    with started(home):
        digest = link.submit(["hello"], tmp_path / "refused.json")
        (answer,) = answers(tmp_path / "refused.json", 1, 60)
        assert (answer["error"], answer["reason"]) == (7, "bundle-not-listed")
        assert digest in home.relay_log.read_text()
    assert not (link.folder / "canary").exists()


def test_killed_children_come_back_and_none_is_left_behind(link: Link, home: Home, tmp_path: Path) -> None:
    """Without the minute in which Flower refuses a node that was killed; then start itself is killed."""
    with started(home) as process:
        link.submit(["hello"] * 200, tmp_path / "out.json", pause_s=0.5)
        answers(tmp_path / "out.json", 2, 60)
        agent, relay = child(home, "agent"), child(home, "relay")
        os.kill(agent, signal.SIGKILL)
        wait_for(lambda: _state(home)["agent"]["pid"] not in (None, agent), 20, "another agent")
        os.kill(relay, signal.SIGKILL)
        killed, before = time.monotonic(), len(answers(tmp_path / "out.json", 1, 1))

        def answered_again() -> bool:
            return any(answer["reply"] for answer in json.loads((tmp_path / "out.json").read_text())[before + 1 :])

        wait_for(answered_again, 55, "answers after the relay was killed")
        print(f"\nanswers again {time.monotonic() - killed:.0f} s after kill -9 of the relay")
        errors = {answer["error"] for answer in json.loads((tmp_path / "out.json").read_text())}
        assert errors <= {
            None,
            5,
        }  # a message that was lost with the relay is a code at once, no wait until its deadline
        children = [child(home, "agent"), child(home, "relay")]
        process.kill()
        wait_for(lambda: not any(psutil.pid_exists(pid) for pid in children), 30, "the end of the children")


def test_refusals_that_a_person_must_mend_end_start(link: Link, home: Home) -> None:
    head = home.ledger / "ledger.head.json"
    head.rename(home.ledger / "away")
    with started(home) as process:
        assert process.wait(60) == ExitCode.STORAGE
    assert "Restore the folder ledger/" in (home.folder / "out.txt").read_text()
    (home.ledger / "away").rename(head)
    home.federation.unlink()
    refused = site("start", home.folder)
    assert refused.returncode == ExitCode.ENROLMENT
    assert "join" in refused.stderr


@pytest.mark.parametrize("case", ["another authority", "not registered"])
def test_a_link_that_is_not_ours_is_named(link: Link, home: Home, case: str, tmp_path: Path) -> None:
    if case == "not registered":
        write_node_key(home.node_key)
    else:
        other = tmp_path / "other"
        other.mkdir()
        write_certificates(other)
        pin(home, link.port, (other / "ca.pem").read_bytes())
    refused = site("relay", home.folder)
    assert refused.returncode == ExitCode.FEDERATION
    assert ("CERTIFICATE_VERIFY_FAILED" if case == "another authority" else "enrolled or revoked") in refused.stderr
    assert "Traceback" not in refused.stderr


def test_no_connection_but_the_coordinators(link: Link, home: Home, tmp_path: Path) -> None:
    """Through a proxy that records: not Flower's telemetry, not its update check, nothing installed."""
    with recording_proxy() as proxy:
        address = f"http://127.0.0.1:{proxy.port}"
        loud = {"FLWR_TELEMETRY_ENABLED": "1", "FLWR_DISABLE_UPDATE_CHECK": "0"}
        loud |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "0"}
        loud |= {"NO_PROXY": "", "no_proxy": ""}
        through = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY"), address)
        with started(home, **loud, **through):
            link.submit(["hello", "unknown"], tmp_path / "out.json")
            found = answers(tmp_path / "out.json", 2, 60)
    assert found[0]["reply"]["fields"]["site"] == "st-mary"
    assert {line.split(" HTTP/")[0] for line in proxy.asked} == {f"CONNECT 127.0.0.1:{link.port}"}
