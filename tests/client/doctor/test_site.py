"""The checks of a site's home, each by what it must find, and that no name of a file or patient is told."""

import datetime as dt
import os
import shutil
from pathlib import Path

import pytest

from client import policy
from client.doctor import site
from client.doctor.findings import Check, Finding, Status, look
from client.home import Home
from client.ledger import ChargeRequest, open_ledger
from client.relay_state import STOPPED, State
from common.certificates import authority_certificate, new_key
from common.crypto import load_key
from common.errors import ExitCode
from common.files import make_folder
from common.messages import Kind
from common.node_keys import new_node_key
from common.privacy import Charge
from tests.pinned import pin
from tests.tiny_site import POLICY

NOW = dt.datetime.now(dt.UTC)
AUTHORITY = authority_certificate(new_key(), "test", NOW)


def found(check: Check) -> tuple[Status, ExitCode]:
    finding = look("check", check)
    assert finding.status is Status.PASS or finding.said
    return finding.status, finding.exit_code


def rules(home: Home, **changes: object) -> policy.Policy:
    return policy.Policy.model_validate(POLICY.model_dump() | changes)


PASS = (Status.PASS, ExitCode.OK)


def test_a_new_home_passes(tiny_home: Home) -> None:
    tiny_home.folder.chmod(0o700)
    for check in (site.check_home, site.check_keys, site.check_policy, site.check_imported, site.check_records):
        assert found(lambda check=check: check(tiny_home)) == PASS, check
    assert found(lambda: site.check_budget(tiny_home, POLICY)) == PASS
    assert found(lambda: site.check_bundles(tiny_home)) == PASS
    assert found(lambda: site.check_extra_ca(tiny_home, NOW)) == PASS


def test_home_that_is_none_or_open_or_incomplete(tiny_home: Home, tmp_path: Path) -> None:
    failed = (Status.FAIL, ExitCode.STORAGE)
    assert found(lambda: site.check_home(Home(tmp_path / "nowhere"))) == failed
    tiny_home.key.parent.chmod(0o750)
    assert "chmod 700" in site.check_home(tiny_home).fix
    tiny_home.key.parent.chmod(0o700)
    tiny_home.policy.chmod(0o622)  # what `start` refuses, too
    assert found(lambda: site.check_home(tiny_home)) == failed
    tiny_home.policy.chmod(0o600)
    tmp_path.chmod(0o777)
    assert found(lambda: site.check_home(tiny_home)) == failed
    tmp_path.chmod(0o700)
    tiny_home.log.parent.rmdir()
    assert found(lambda: site.check_home(tiny_home)) == failed
    assert "logs" in site.check_home(tiny_home).said


@pytest.mark.parametrize("name", ["key", "node_key"])
def test_keys_that_others_can_read(tiny_home: Home, name: str) -> None:
    path = getattr(tiny_home, name)
    path.chmod(0o640)
    assert found(lambda: site.check_keys(tiny_home)) == (Status.FAIL, ExitCode.STORAGE)
    assert "chmod 600" in look("keys", lambda: site.check_keys(tiny_home)).line
    path.unlink()
    assert found(lambda: site.check_keys(tiny_home)) == (Status.FAIL, ExitCode.STORAGE)


def test_a_key_that_waits_for_the_coordinator(tiny_home: Home) -> None:
    tiny_home.next_key.write_bytes(b"")
    assert found(lambda: site.check_keys(tiny_home))[0] is Status.WARN


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"may_declare": ["name"]}, (Status.FAIL, ExitCode.PRIVACY)),
        ({"declared_patients": 5}, (Status.FAIL, ExitCode.PRIVACY)),
        ({"allow_unmasked_shares": True}, (Status.FAIL, ExitCode.PRIVACY)),
        ({"delta": 0.1}, (Status.WARN, ExitCode.OK)),
    ],
)
def test_policies_that_let_nobody_take_part(tiny_home: Home, changes: dict, expected: tuple) -> None:
    policy.save(tiny_home.policy, rules(tiny_home, **changes))
    assert found(lambda: site.check_policy(tiny_home)) == expected


def test_a_policy_that_does_not_read(tiny_home: Home) -> None:
    tiny_home.policy.write_text("sites = 3\n")
    assert found(lambda: site.check_policy(tiny_home)) == (Status.FAIL, ExitCode.CONFIG)


def folder_of_images(home: Home, patients: int) -> Path:
    folder = home.folder.parent / "images"
    folder.mkdir()
    lines = ["file,patient,label"]
    for number in range(patients):
        (folder / f"smith-{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        lines.append(f"smith-{number}.png,Smith^{number},{'' if number == 0 else 'clear'}")
    (folder / "jones.png").write_bytes(b"no image")
    (folder / "index.csv").write_text("\n".join([*lines, "jones.png,Jones,clear", "gone.png,Gone,clear"]) + "\n")
    (home.folder / "site.toml").write_text(f'data = "{folder}"\n')
    return folder


def test_data_is_counted_and_no_name_is_told(tiny_home: Home) -> None:
    folder_of_images(tiny_home, 30)
    finding = site.check_data(tiny_home, POLICY)
    assert finding.status is Status.PASS
    assert "29 images of 29 patients" in finding.said
    assert all(reason in finding.said for reason in ("1 no label", "1 file missing", "1 neither PNG nor JPEG"))
    assert not any(name in finding.line.lower() for name in ("smith", "jones", "gone", ".png", "clear"))


@pytest.mark.parametrize("imported", [True, False])
def test_data_that_cannot_be_used(imported: bool, tiny_home: Home) -> None:
    """With a set imported the site takes part without them: docs/hospital.md says to move them away."""
    folder = folder_of_images(tiny_home, 8)
    if not imported:
        for vault in tiny_home.folder.glob("vault-*"):
            shutil.rmtree(vault)
    needed = (Status.WARN, ExitCode.OK)
    failed = needed if imported else (Status.FAIL, ExitCode.DATA)
    assert found(lambda: site.check_data(tiny_home, POLICY)) == failed  # fewer than min_patients
    (folder / "index.csv").write_text("file,patient,label\n")
    assert found(lambda: site.check_data(tiny_home, POLICY)) == failed
    (tiny_home.folder / "site.toml").write_text('data = "/nowhere"\n')
    assert found(lambda: site.check_data(tiny_home, POLICY)) == (
        needed if imported else (Status.FAIL, ExitCode.UNREADABLE)
    )
    if imported:
        assert "next import" in site.check_data(tiny_home, POLICY).fix
    (tiny_home.folder / "site.toml").write_text("")
    assert found(lambda: site.check_data(tiny_home, POLICY)) == (Status.FAIL, ExitCode.CONFIG)


def test_data_far_from_what_is_declared(tiny_home: Home) -> None:
    folder_of_images(tiny_home, 30)
    assert site.check_data(tiny_home, rules(tiny_home, declared_patients=400)).status is Status.WARN


def test_imported_sets(tiny_home: Home) -> None:
    (path,) = tiny_home.folder.glob("vault-*/pixels-*")
    path.chmod(0o644)
    assert found(lambda: site.check_imported(tiny_home)) == (Status.FAIL, ExitCode.STORAGE)
    path.write_bytes(b"damaged")
    assert found(lambda: site.check_imported(tiny_home)) == (Status.FAIL, ExitCode.STORAGE)
    path.chmod(0o600)
    assert found(lambda: site.check_imported(tiny_home)) == (Status.FAIL, ExitCode.STORAGE)
    shutil.rmtree(path.parent)
    assert found(lambda: site.check_imported(tiny_home))[0] is Status.WARN


def charge(home: Home, noise_multiplier: float) -> None:
    ledger = open_ledger(home.ledger, load_key(home.key))
    request = ChargeRequest("run-1", len(ledger.entries), Kind.TRAIN, "0" * 64)
    ledger.charge(request, Charge(noise_multiplier, 0.5, 1), 1e9, POLICY.delta)


def test_budget_that_is_nearly_or_wholly_spent(tiny_home: Home) -> None:
    charge(tiny_home, 1.0)
    spent = open_ledger(tiny_home.ledger, load_key(tiny_home.key)).spent(POLICY.delta)
    low, none = rules(tiny_home, max_epsilon=spent * 1.01), rules(tiny_home, max_epsilon=spent)
    assert found(lambda: site.check_budget(tiny_home, low))[0] is Status.WARN
    assert found(lambda: site.check_budget(tiny_home, none)) == (Status.FAIL, ExitCode.PRIVACY)


def test_books_that_are_gone_or_changed(tiny_home: Home) -> None:
    charge(tiny_home, 1.0)
    (lines,) = tiny_home.ledger.glob("*.jsonl")
    lines.write_bytes(lines.read_bytes().replace(b"run-1", b"run-2"))
    assert found(lambda: site.check_records(tiny_home)) == (Status.FAIL, ExitCode.STORAGE)
    (tiny_home.ledger / "ledger.head.json").unlink()
    assert found(lambda: site.check_budget(tiny_home, POLICY)) == (Status.FAIL, ExitCode.STORAGE)


def test_bundles_are_shown(tiny_home: Home) -> None:
    tiny_home.bundles.write_text("a" * 64 + "\n")
    assert "a" * 64 in site.check_bundles(tiny_home).said
    tiny_home.bundles.write_text("")
    assert found(lambda: site.check_bundles(tiny_home))[0] is Status.WARN
    tiny_home.bundles.write_text("abc\n")
    assert found(lambda: site.check_bundles(tiny_home)) == (Status.FAIL, ExitCode.CONFIG)


def joined(home: Home, days_later: float = 0) -> Finding:
    return look("joined", lambda: site.check_joined(home, NOW + dt.timedelta(days=days_later)))


def test_joined_or_not_and_for_how_long(tiny_home: Home) -> None:
    assert joined(tiny_home).exit_code is ExitCode.ENROLMENT
    pin(tiny_home, ca_pem=AUTHORITY)
    assert joined(tiny_home).status is Status.PASS
    assert joined(tiny_home, 30).status is Status.PASS  # the invitation is over: it was accepted in time
    assert joined(tiny_home, 7300).status is Status.WARN
    assert joined(tiny_home, 7400).exit_code is ExitCode.ENROLMENT


def test_joined_with_another_node_key_or_a_changed_pin(tiny_home: Home) -> None:
    pin(tiny_home, ca_pem=AUTHORITY)
    tiny_home.node_key.write_bytes(new_node_key())
    assert joined(tiny_home).exit_code is ExitCode.ENROLMENT
    tiny_home.federation.write_bytes(tiny_home.federation.read_bytes().replace(b"127.0.0.1", b"127.0.0.2"))
    assert joined(tiny_home).exit_code is ExitCode.STORAGE


def test_extra_ca_and_its_end(tiny_home: Home, tmp_path: Path) -> None:
    (tmp_path / "proxy.pem").write_bytes(AUTHORITY)
    with (tiny_home.folder / "site.toml").open("a") as file:
        file.write(f'extra_ca = "{tmp_path / "proxy.pem"}"\n')
    for days, status in ((0, Status.PASS), (7300, Status.WARN), (7400, Status.FAIL)):
        then = NOW + dt.timedelta(days=days)
        assert site.check_extra_ca(tiny_home, then).status is status
    (tmp_path / "proxy.pem").write_text("none")
    assert found(lambda: site.check_extra_ca(tiny_home, NOW)) == (Status.FAIL, ExitCode.CONFIG)


def test_a_relay_that_was_refused_is_told_until_the_site_joins_again(tiny_home: Home) -> None:
    pin(tiny_home)
    assert site.check_relay(tiny_home).status is Status.PASS
    make_folder(tiny_home.relay_state.parent, 0o700)
    state = State(tiny_home.relay_state)
    state.end(STOPPED)
    assert site.check_relay(tiny_home).status is Status.PASS
    state.end("The link does not let this site in.")
    told = site.check_relay(tiny_home)
    assert (told.status, told.exit_code) == (Status.FAIL, ExitCode.FEDERATION)
    assert "does not let this site in" in told.said
    later = tiny_home.relay_state.stat().st_mtime + 5
    os.utime(tiny_home.federation, (later, later))
    assert site.check_relay(tiny_home).status is Status.PASS
    for damaged in ("[" * 20_000, '{"ended": ' + "[" * 950 + "]" * 950 + "}"):
        tiny_home.relay_state.write_text(damaged)
        assert site.check_relay(tiny_home).status is Status.PASS
