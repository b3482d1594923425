"""`fedmedgan-site doctor`: the checks in order, one line each. Out of scope: what each looks at."""

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer

from client import policy
from client.doctor import machine, network, site
from client.doctor.findings import Check, Finding, Status, exit_code, look, once, passed, skipped, summary
from client.home import Home
from client.joining import Pinned, load_pinned
from client.policy import Policy
from client.trust import extra_ca, trusted
from common.errors import FedmedganError
from common.files import require_outside, write_atomic

VERSION = 1


def doctor(
    home: Annotated[Path, typer.Argument(help="The site's home folder.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the same as JSON to this file, mode 600.")
    ] = None,
    socket: Annotated[Path | None, typer.Option(help="The agent's Unix socket; HOME/agent.sock unless named.")] = None,
) -> None:
    """Check whether this site could take part now: one line each, PASS or how to mend it. Changes nothing.

    Connects to the coordinator and to the proxy that HTTPS_PROXY names, and to nobody else. Exact counts of images and
    patients are shown for this site's eyes: send them to nobody.

    Exits 0 when nothing fails, else with the code of the first failure: 3 a setting, the socket's path, Flower's
    release or the extra CA; 4, 15 the images; 5 policy or budget; 7 files, permissions, disk, ledger or journal; 8
    network, proxy, server or clock; 9 Flower is missing; 10 a file or the agent is of another release; 11 keys,
    certificates or enrolment, or not joined. WARN fails nothing; SKIP was not checked, since a FAIL above tells why.
    """
    opened = Home(home.absolute())
    if json_file is not None:
        require_outside(opened.folder, json_file)
    findings: list[Finding] = []
    for name, check in checks(opened, (socket or opened.socket).absolute(), datetime.now(UTC)):
        findings.append(once(look(name, check), findings))
        print(findings[-1].line, flush=True)
    counts = [f"{sum(finding.status is status for finding in findings)} {status}" for status in Status]
    code = exit_code(findings)
    print(summary(findings))
    print(f"{', '.join(counts)}; exit code {code:d}")
    if json_file is not None:
        write_atomic(json_file, (json.dumps(as_json(findings), indent=1) + "\n").encode(), 0o600)
    if code:
        raise typer.Exit(code)


def checks(home: Home, socket: Path, now: datetime) -> Iterator[tuple[str, Check]]:
    """Yield the checks that make sense here, in order; each is made when the one before it has been told.

    Args:
        home: The site's home.
        socket: The agent's socket.
        now: The time.
    """
    yield "home", lambda: site.check_home(home)
    if not (home.key.exists() or home.policy.exists()):
        return  # no site's home: said by `home`, and the rest would speak of what never was
    yield "keys", lambda: site.check_keys(home)
    yield "policy", lambda: site.check_policy(home)
    rules = _rules(home)
    if rules is not None:  # else `policy` has failed
        yield "data", lambda: site.check_data(home, rules)
    yield "imported", lambda: site.check_imported(home)
    yield "disk", lambda: machine.check_disk(shutil.disk_usage(home.folder).free)
    if rules is not None:
        yield "memory", lambda: _memory(home, rules)
    yield "gpu", lambda: machine.check_gpu(torch.version.cuda, machine.devices())
    yield "records", lambda: site.check_records(home)
    if rules is not None:
        yield "budget", lambda: site.check_budget(home, rules)
    yield "flower", lambda: machine.check_flower(machine.installed_flower(), machine.wanted_flower())
    yield "socket", lambda: machine.check_socket(socket)
    yield "bundles", lambda: site.check_bundles(home)
    yield "joined", lambda: site.check_joined(home, now)
    yield "extra CA", lambda: site.check_extra_ca(home, now)
    pinned = _pinned(home)
    if pinned is not None:
        yield from _network_checks(home, pinned)
        yield "relay", lambda: site.check_relay(home)


def as_json(findings: list[Finding]) -> dict[str, object]:
    """Return all findings as plain values."""
    told = [
        {"name": one.name, "status": one.status, "said": one.said, "fix": one.fix, "exit_code": int(one.exit_code)}
        for one in findings
    ]
    return {"version": VERSION, "findings": told, "exit_code": int(exit_code(findings))}


def _network_checks(home: Home, pinned: Pinned) -> Iterator[tuple[str, Check]]:
    try:
        way = network.way_to(pinned)
    except FedmedganError:
        yield "proxy", lambda: passed("proxy", repr(network.way_to(pinned)))  # raises again, as this check's finding
        return
    try:
        extra, ca_pem = extra_ca(home), trusted(home, pinned.ca_pem)
    except FedmedganError:  # said by `extra CA`
        extra, ca_pem = (), pinned.ca_pem
    steps: list[tuple[str, Check]] = [
        ("dns", lambda: network.check_dns(way)),
        ("proxy", lambda: network.check_proxy(way)),
        ("tls", lambda: network.check_tls(way, pinned.ca_pem, extra)),
        ("health", lambda: network.check_health(way, ca_pem)),
        ("clock", lambda: network.check_clock(way, ca_pem)),
    ]
    broken: list[str] = []  # where the way ends, all that lies behind fails for the same reason
    for name, check in steps:
        yield name, lambda name=name, check=check: _step(name, check, broken)


def _step(name: str, check: Check, broken: list[str]) -> Finding:
    if broken:
        return skipped(name, broken[0])
    finding = look(name, check)
    broken += [name] if finding.status is Status.FAIL else []
    return finding


def _memory(home: Home, rules: Policy) -> Finding:
    return machine.check_memory(machine.available_bytes(), machine.needed_bytes(rules, site.images_bytes(home)))


def _rules(home: Home) -> Policy | None:
    try:
        return policy.load(home.policy)
    except FedmedganError:
        return None


def _pinned(home: Home) -> Pinned | None:
    try:
        return load_pinned(home.folder)
    except (FedmedganError, OSError):  # not joined, or damaged: said by `joined`
        return None
