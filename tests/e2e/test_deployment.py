"""Three hospitals and a coordinator as they are run: from `init` to a generator, when all is well and when it is not.

`make e2e` runs this file with the whole schedule of faults, which takes half an hour; `make test` runs the first test.
FEDMEDGAN_E2E=short: all of it with few faults; FEDMEDGAN_FAULTS_SEED draws others.
"""

import json
import os
import re
import sqlite3
import subprocess
import threading
import time
from contextlib import ExitStack

import psutil
import pytest

from client.paths import Home
from common.errors import ExitCode
from server.consortium import load_consortium, read_settings
from server.registered import read_nodes
from tests.e2e.faults import Script, pin_a_wrong_ca, schedule, small_disk
from tests.e2e.federation import RUN, SITES, Federation, check_result, federation, wait_for
from tests.e2e.recording_proxy import recording_proxy
from tests.e2e.slow_proxy import Weather, slow_proxy
from tests.e2e.x_rays import PATIENTS, REAL

WHOLE = os.environ.get("FEDMEDGAN_E2E") == "whole"
ON_DEMAND = pytest.mark.skipif(
    "FEDMEDGAN_E2E" not in os.environ, reason="minutes long: FEDMEDGAN_E2E=short, or `make e2e`"
)
SEED = int(os.environ.get("FEDMEDGAN_FAULTS_SEED", "41"))  # kills relay, agent, `start` and link
OUTAGE_S = float(os.environ.get("FEDMEDGAN_OUTAGE_S", "0"))
WHOLE_LINE = os.environ.get("FEDMEDGAN_BAD_LINE") == "full"
KILLS, CUTS, LONGEST_CUT_S, ROUNDS = (20, 2, 60.0, 40) if WHOLE else (4, 1, 12.0, 10)
RUN_ENDS_S = 2400.0 if WHOLE else 500.0

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(3000 if WHOLE else 600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what Flower uses
]


def test_from_init_to_a_generator() -> None:
    print(f"\nimages: {'chest X-rays' if REAL else 'phantoms, since the shared X-rays are absent'}")
    with recording_proxy() as recorder, federation(*[f"http://127.0.0.1:{recorder.port}"] * 2) as made:
        made.found()
        made.start_coordinator()
        for site in SITES:
            made.start_site(site)
        command = made.start_run({}, "--start", made.write_start())
        wait_for(lambda: len(made.records()) > 2 or command.poll() is not None, 200, "round 2")
        command = _power_loss(made, command)
        wait_for(lambda: len(made.records()) > 3 or command.poll() is not None, 200, "round 3")
        assert all(set(record["sites"]) == set(SITES) for record in made.records())
        _long_outage(made)
        assert command.wait(250 + OUTAGE_S) == 0, made.said()
        _look_at_handshake(made)
        _look_at_status(made)
        _revoke(made, SITES[2])
        assert json.loads((made.run / "start" / "generator.json").read_bytes())["run_id"] == "public"
        assert json.loads((made.run / "looks.json").read_bytes())["looks"].keys() == {"0"}
        check_result(made, 6)
        # behind a proxy, and nobody but the coordinator was asked for: no telemetry, no update check, no package index
        port = read_settings(load_consortium(made.hub)).port
        assert {line.split(" HTTP/")[0] for line in recorder.asked} == {f"CONNECT 127.0.0.1:{port}"}


def _power_loss(made: Federation, command: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """Kill the run and leave its newest checkpoint half written; a person resumes it, from the one before."""
    (run,) = made.processes(made.hub, "--run")
    run.kill()
    run.wait(20)
    newest = max(made.run.glob("checkpoints/round-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    assert command.wait(90) == ExitCode.FEDERATION, made.said()
    resumed = made.resume()
    line = f"{newest.name} is damaged: going on from round {int(newest.stem[-6:]) - 1}"
    wait_for(lambda: line in (made.folder / "out.log").read_text(), 60, line)
    return resumed


def _long_outage(made: Federation) -> None:
    """Kill the link and keep it away, to Flower for longer than the minute after which it gives a run up.

    FEDMEDGAN_OUTAGE_S: for so many seconds by the clock; else for a moment, and the run's last sign of life is dated
    back by five minutes.
    """
    (supervisor,) = made.processes(made.hub, "server.supervise")
    (link,) = made.processes(made.hub, "server.link")
    supervisor.suspend()
    try:
        link.kill()
        wait_for(lambda: link.status() == psutil.STATUS_ZOMBIE, 20, "the link's end")
        time.sleep(max(OUTAGE_S, 1.0))
        if not OUTAGE_S:
            with sqlite3.connect(load_consortium(made.hub).database) as database:
                query = "UPDATE task SET active_until = datetime(active_until, '-300 seconds') WHERE token IS NOT NULL"
                assert database.execute(query).rowcount == 1
            database.close()
    finally:
        supervisor.resume()


def _look_at_handshake(made: Federation) -> None:
    """What every site said before the run: on the terminal, and kept in the run's folder."""
    kept, said = json.loads((made.run / "handshake.json").read_text()), (made.folder / "out.log").read_text()
    verdicts = {name: (one["verdict"], one["rounds_allowed"]) for name, one in kept["sites"].items()}
    assert verdicts == dict.fromkeys(SITES, ("ok", 7))
    assert {one["proposal_sha256"] for one in kept["sites"].values()} == {kept["config_sha256"]}
    for name in SITES:
        assert re.search(rf"{name} +{PATIENTS} patients  fedmedgan \S+  will join 6 of 6 rounds", said)
    assert set(read_nodes(load_consortium(made.hub)).values()) == set(SITES)


def _look_at_status(made: Federation) -> None:
    """What a person reads of a run that was completed, and of one that every site refuses."""
    said = (made.folder / "out.log").read_text()
    assert not [one for one in ("Successfully installed", "Traceback", "\x1b[") if one in said]
    assert re.search(r"round 6/6 .* MB down \d+\.\d\d MB up a site", said)
    tree = json.loads(made.command("coordinator", "status", made.hub, "--json"))
    assert [(one["state"], one["round"], one["rounds"]) for one in tree["runs"]] == [("completed", 6, 6)]
    assert all(0 < site["rounds_joined"] <= site["rounds"] == 7 for site in tree["sites"])
    assert all(0 < site["epsilon_spent"] <= site["epsilon_allowed"] for site in tree["sites"])
    assert re.search(r"run-0001 +completed +6/6", made.command("coordinator", "status", made.hub))
    other = made.write_config({**RUN, "image.classes": ("x", "y")})
    refused = made.command("coordinator", "run", made.hub, other, code=ExitCode.FEDERATION).splitlines()
    assert len(refused) == 6, refused  # where the run stands, the handshake with each site, why it ended
    assert not [line for line in refused if "Traceback" in line]
    assert [line for line in refused if "will not join: no images imported" in line] == refused[2:5]
    assert "Every site refuses this run for good (st-anne: no-data, st-john: no-data" in refused[5]


def _revoke(made: Federation, site: str) -> None:
    """Put a site out while its relay is connected: the relay ends with a code, and `status` says why at once."""
    made.command("site", "status", made.home(site))
    made.command("coordinator", "revoke", made.hub, site)
    log = Home(made.home(site)).start_log
    wait_for(lambda: "relay ended with code 8" in log.read_text(), 60, "the end of the revoked relay")
    assert "NOT connected: The link" in made.command("site", "status", made.home(site), code=ExitCode.FEDERATION)


@ON_DEMAND
def test_from_init_to_a_generator_with_faults() -> None:
    """Kills, cuts, a full disk, an expired certificate, an unregistered node, a wrong CA: the run completes."""
    faults = schedule(SEED, ROUNDS, KILLS, CUTS, LONGEST_CUT_S)
    print(f"\nseed {SEED}; to see the same again: FEDMEDGAN_FAULTS_SEED={SEED}", *faults, sep="\n  ")
    with ExitStack() as stack:
        line = stack.enter_context(slow_proxy(Weather()))
        made = stack.enter_context(federation(f"http://127.0.0.1:{line.port}"))
        if not stack.enter_context(small_disk(made.home(SITES[0]), 32)):
            faults = tuple(fault for fault in faults if fault.what != "disk full")
            print("no disk is filled: this machine lets no small one be mounted")
        made.found()
        pin_a_wrong_ca(made, SITES[2])
        made.start_coordinator()
        for site in SITES:
            made.start_site(site)
        script = Script(made, line, faults)
        resumed = _bring_to_an_end(made, script)
        assert [who for who, service in made.services.items() if service.poll() is not None] == []  # nobody gave up
        print(f"{len(script.done)} faults; {resumed} times a person had to `resume`")
        check_result(made, ROUNDS)


def _bring_to_an_end(made: Federation, script: Script) -> int:
    """Start a run and resume it whenever it ends early, as a person would; return how often."""
    player = threading.Thread(target=script.play, daemon=True)
    command, resumed, started = made.start_run({"federation.rounds": ROUNDS}), 0, time.monotonic()
    player.start()
    try:
        while (code := command.poll()) != 0 and script.failed is None and time.monotonic() - started < RUN_ENDS_S:
            if code is not None:
                last = [text for text in (made.folder / "out.log").read_text().splitlines() if text][-1]
                script.say(f"the run ended early, resumed: {last}")
                command, resumed = made.resume(), resumed + 1
            time.sleep(0.2)
    finally:
        script.over.set()
    player.join(60)
    if command.poll() != 0 or script.failed or len(script.done) < len(script.faults):
        raise AssertionError(f"{made.said()}\n{script.failed!r}\n{len(script.done)} faults") from script.failed
    return resumed


@ON_DEMAND
@pytest.mark.timeout(2500 if WHOLE_LINE else 400)
def test_a_run_ends_well_behind_a_bad_line() -> None:
    """All three sites share 2 Mbit/s with 300 ms there and back; three tunnels of ten are reset; one cut.

    FEDMEDGAN_BAD_LINE=full: ten rounds of the default model with a cut of 60 s, which takes minutes.
    """
    changes: dict[str, object] = {"federation.rounds": 3}
    if WHOLE_LINE:
        changes = {
            "federation.rounds": 10,
            "federation.round_timeout_s": 300.0,
            "federation.connect_timeout_s": 300.0,
            "image.size": 32,
            "model.name": "dcgan",
        }
        changes |= dict.fromkeys(("model.latent_dim", "model.generator_width", "model.discriminator_width"))
    weather = Weather(2e6, 0.15, 0.3, cut_after_s=20.0, cut_s=60.0 if WHOLE_LINE else 10.0)
    with slow_proxy(weather) as line, federation(f"http://127.0.0.1:{line.port}") as made:
        made.found(32 if WHOLE_LINE else 28)
        made.start_coordinator()
        for site in SITES:
            made.start_site(site)
        assert made.start_run(changes).wait(2400 if WHOLE_LINE else 240) == 0, made.said()
        print((made.folder / "out.log").read_text())
        print(f"{line.bytes_through:,} bytes, {line.resets} resets, {line.refused} tunnels refused")
        assert line.refused > 0
        assert line.resets > 0
        check_result(made, int(str(changes["federation.rounds"])))
