"""What goes wrong between hospitals and a coordinator, drawn from a seed and done to a federation that runs."""

import datetime as dt
import os
import random
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from client.paths import Home
from common.certificates import authority_certificate, new_key
from common.errors import ExitCode, RefusalCode
from common.files import write_atomic
from server.consortium import load_consortium, read_settings
from tests.e2e.federation import SITES, Federation, wait_for
from tests.e2e.slow_proxy import SlowProxy
from tests.e2e.x_rays import PATIENTS
from tests.pinned import pin

What = Literal["kill", "cut", "disk full", "expired certificate", "unregistered node", "wrong CA"]
AT_SITES, AT_THE_HUB = ("agent", "relay", "start"), ("link", "executor", "run")
EXPIRED, NOT_OURS = "certificate has expired", "CERTIFICATE_VERIFY_FAILED"
PATIENCE_S = 300.0
"""For what must come by itself: a killed process, a site that is back."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        round: It happens when this round is done.
        delay_s: And so long after it.
        what: Its kind.
        whom: A process, or a site, or both: "relay of st-mary".
        seconds: How long it lasts at least; a kill takes no time.
    """

    round: int
    delay_s: float
    what: What
    whom: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        lasts = f" for {self.seconds:.0f} s" if self.seconds else ""
        return f"{self.delay_s:.1f} s after round {self.round}: {self.what} {self.whom}".rstrip() + lasts


def schedule(seed: int, rounds: int, kills: int, cuts: int, longest_cut_s: float) -> tuple[Fault, ...]:
    """Draw faults: kills that take turns among all kinds of processes, cuts, and one of each other kind.

    The same arguments give the same faults. One site has a wrong CA from the start, which is mended while the run
    waits for it. They strike in the first half, since rounds go on while one lasts, and all of them have to.
    """
    rng = random.Random(seed)
    kinds = [*AT_SITES, *AT_THE_HUB]
    turns = [kind for _ in range(kills // len(kinds) + 1) for kind in rng.sample(kinds, len(kinds))][:kills]
    drawn: list[tuple[What, str, float]] = [
        ("kill", f"{kind} of {rng.choice(SITES)}" if kind in AT_SITES else kind, 0.0) for kind in turns
    ]
    drawn += [("cut", "all sites", rng.uniform(longest_cut_s / 6, longest_cut_s)) for _ in range(cuts)]
    drawn += [("disk full", SITES[0], 0.0), ("expired certificate", "", 5.0), ("unregistered node", "", 0.0)]
    rng.shuffle(drawn)
    times = sorted(rng.randrange(1, rounds // 2) for _ in drawn)
    later = [
        Fault(number, round(rng.uniform(0, 2), 1), what, whom, round(seconds, 1))
        for number, (what, whom, seconds) in zip(times, drawn, strict=True)
    ]
    return Fault(-1, 0.0, "wrong CA", SITES[2]), *later


@dataclass
class Script:
    """Does faults to a federation, one after the other, while its run goes on."""

    made: Federation
    line: SlowProxy
    faults: tuple[Fault, ...]
    over: threading.Event = field(default_factory=threading.Event)
    done: list[Fault] = field(default_factory=list)
    failed: BaseException | None = None

    def play(self) -> None:
        """Do all faults; for a thread of its own."""
        try:
            for fault in self.faults:
                self.wait_for_round(fault.round)
                time.sleep(fault.delay_s)
                started = time.monotonic()
                ACTS[fault.what](self, fault)
                self.done.append(fault)
                self.say(f"{fault}; took {time.monotonic() - started:.1f} s")
        except Exception as error:  # noqa: BLE001 - told by the main thread
            self.failed = error
            self.say(f"the script failed: {error!r}")

    def say(self, what: str) -> None:
        print(f"[round {self.round()}] {what}", flush=True)

    def round(self) -> int:
        """Return the last round that is real; -1 before the first."""
        records = self.made.records()
        return records[-1]["round"] if records else -1

    def wait_for_round(self, number: int) -> None:
        def reached() -> bool:
            if self.over.is_set():
                raise RuntimeError("the run ended before all faults were done")
            return self.round() >= number

        wait_for(reached, 1200, f"round {number}")


def kill(script: Script, fault: Fault) -> None:
    """Kill -9 a process, as soon as it is there; a site's `start` is started anew, as a service manager would."""
    kind, _, site = fault.whom.partition(" of ")
    made = script.made
    home = made.home(site) if site else made.hub
    names = {
        "agent": ("serve", home),
        "relay": ("relay", home),
        "start": ("client.entry", "start", home),
        "link": ("server.link", home),
        "executor": ("server.executor", home),
        "run": ("server.run_process", home),
    }[kind]
    for victim in wait_for(lambda: made.processes(*names), PATIENCE_S, fault.whom):
        victim.kill()
    if kind == "start":
        made.services[site].wait(10)
        made.start_site(site)


def cut(script: Script, fault: Fault) -> None:
    """Cut the line of all sites, and go on with the next fault meanwhile."""
    script.line.cut(fault.seconds)


def fill_the_disk(script: Script, fault: Fault) -> None:
    """Leave a site's disk without a byte until the site had to refuse a round, then free it and see it come back."""
    made, site = script.made, fault.whom
    before = script.round()
    filler = made.home(site) / "filler"
    with filler.open("wb", buffering=0) as handle:
        try:
            while handle.write(b"\0" * 4096):
                pass
        except OSError:
            pass  # full
    try:
        refused = wait_for(lambda: _codes(script, site, before), PATIENCE_S, f"a refusal of {site}")
    finally:
        filler.unlink()
    free = script.round()
    script.say(f"{site} without disk: {refused}")
    wait_for(lambda: [r for r in made.records() if r["round"] > free and site in r["sites"]], PATIENCE_S, site)


def _codes(script: Script, site: str, after: int) -> list[str]:
    codes = [r["refused"].get(site) for r in script.made.records() if r["round"] > after]
    return [code for code in codes if code == RefusalCode.INTERNAL]  # others come of other faults


def show_an_expired_certificate(script: Script, fault: Fault) -> None:
    """Let the coordinator's certificate end, every site connect anew and refuse it; then `renew`."""
    made, consortium = script.made, load_consortium(script.made.hub)
    ended = _ended(consortium.server_pem.read_bytes(), consortium.ca_key.read_bytes())
    before = {site: _times_said(made, site, EXPIRED) for site in SITES}
    started = time.monotonic()
    write_atomic(consortium.server_pem, ended)
    port = read_settings(consortium).port
    wait_for(lambda: _shown(port) == ended, PATIENCE_S, "the link to show it")
    script.line.cut(0.5)
    for site in SITES:
        wait_for(lambda site=site: _times_said(made, site, EXPIRED) > before[site], PATIENCE_S, f"{site} to refuse it")
    time.sleep(max(0.0, started + fault.seconds - time.monotonic()))
    made.command("coordinator", "renew", made.hub)


def _ended(certificate: bytes, authority_key: bytes) -> bytes:
    """Return a certificate as it would be a day after its end."""
    good, now = x509.load_pem_x509_certificate(certificate), dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder(good.issuer, good.subject, good.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - dt.timedelta(days=2)).not_valid_after(now - dt.timedelta(days=1))
    for extension in good.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(load_pem_private_key(authority_key, None), SHA384()).public_bytes(Encoding.PEM)


def _shown(port: int) -> bytes:
    """Return the certificate that the link shows; nothing while it is away."""
    try:
        return ssl.get_server_certificate(("127.0.0.1", port), timeout=5).encode()
    except OSError:
        return b""


def _times_said(made: Federation, site: str, what: str) -> int:
    log = Home(made.home(site)).relay_log
    return log.read_text().count(what) if log.exists() else 0


def knock_without_being_registered(script: Script, fault: Fault) -> None:
    """A node that trusts the right authority and was never enrolled asks to be let in, and is told no."""
    del fault
    made, consortium = script.made, load_consortium(script.made.hub)
    home = Home(made.folder / "nobody")
    made.command("site", "init", home.folder, "--name", "nobody", "--data", made.folder, "--patients", PATIENTS)
    pin(home, read_settings(consortium).port, consortium.ca_pem.read_bytes())
    wait_for(lambda: _shown(read_settings(consortium).port), PATIENCE_S, "the link")
    said = made.command("site", "relay", home.folder, code=ExitCode.FEDERATION)
    assert "does not let this site in" in said


def mend_a_wrong_ca(script: Script, fault: Fault) -> None:
    """See a site refuse the coordinator, since it pinned another authority; enrol and join it anew while it runs."""
    made, site = script.made, fault.whom
    wait_for(lambda: _times_said(made, site, NOT_OURS), PATIENCE_S, f"{site} to refuse the coordinator")
    made.command("site", "status", made.home(site), code=ExitCode.FEDERATION)
    made.enrol(site)
    wait_for(lambda: _times_said(made, site, "connected; node"), PATIENCE_S, f"{site} to connect")


def pin_a_wrong_ca(made: Federation, site: str) -> None:
    """Join a site by an invitation of the same coordinator with another authority, as from a backup mixed up."""
    other = made.folder / "backup"
    shutil.copytree(made.hub, other)
    consortium, key = load_consortium(other), new_key()
    write_atomic(consortium.ca_key, key, 0o600)
    write_atomic(consortium.ca_pem, authority_certificate(key, "lungs", dt.datetime.now(dt.UTC)))
    made.enrol(site, other)


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[bool]:
    """Mount a disk of a few MiB of its own at a folder; tell whether this machine allows it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


ACTS: dict[What, Callable[[Script, Fault], None]] = {
    "kill": kill,
    "cut": cut,
    "disk full": fill_the_disk,
    "expired certificate": show_an_expired_certificate,
    "unregistered node": knock_without_being_registered,
    "wrong CA": mend_a_wrong_ca,
}
