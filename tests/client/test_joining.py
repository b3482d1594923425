"""A site's membership on files: what it accepts, what it refuses with what to do, and what a crash leaves."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client import joining
from client.joining import (
    enrolment_file,
    join,
    leave,
    load_pinned,
    make_next_key,
    make_node_key,
    read_for,
)
from client.paths import Home
from common.certificates import authority_certificate, new_key
from common.crypto import SigningKey
from common.enrolment import Invitation, Member, read_enrolment, write_invitation
from common.errors import EnrolmentError, StorageError
from common.node_keys import node_public_key

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
SITE, COORDINATOR = SigningKey(bytes([1]) * 32), SigningKey(bytes([2]) * 32)
IDENTITY = SITE.verify_key
AUTHORITY = authority_certificate(new_key(), "lungs", NOW).decode()


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    make_node_key(folder)
    return folder


def invite(home, key=COORDINATOR, later=timedelta(), **changes):
    """Answer what the site would send now, as an honest coordinator does but for the changes."""
    enrolment = read_enrolment(enrolment_file(home, "st-mary", SITE, NOW), NOW)
    values = {
        "created": NOW + later,
        "federation": "lungs",
        "host": "fed.example.org",
        "port": 8443,
        "authority": AUTHORITY,
        "coordinator": key.verify_key.to_bytes().hex(),
        "site": enrolment.site,
        "identity": enrolment.identity,
        "node_key": enrolment.node_key,
        "roster": (Member(site="st-mary", identity=enrolment.identity),),
        "expires": NOW + later + timedelta(days=30),
    }
    return write_invitation(Invitation.model_validate(values | changes), key)


def accept(home, content, now=NOW):
    read_for(home, content, "st-mary", IDENTITY, now)
    join(home, content)


def files(home):
    return {path.name: path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()}


def test_public_only(home):
    content = enrolment_file(home, "st-mary", SITE, NOW)
    assert set(json.loads(content)["document"]) == {"version", "created", "site", "identity", "node_key"}
    assert SITE.to_bytes().hex().encode() not in content
    assert b"PRIVATE" not in content
    assert Home(home).node_key.stat().st_mode & 0o777 == 0o600
    assert Home(home).node_pub.read_bytes() == node_public_key(Home(home).node_key.read_bytes()) + b"\n"


def test_a_node_key_is_kept(home):
    before = files(home)
    make_node_key(home)
    enrolment_file(home, "st-mary", SITE, NOW)
    assert files(home) == before


def test_joined(home):
    accept(home, invite(home))
    pinned = load_pinned(home)
    assert (pinned.host, pinned.port, pinned.site, pinned.federation) == ("fed.example.org", 8443, "st-mary", "lungs")
    assert (pinned.ca_pem, pinned.coordinator) == (AUTHORITY.encode(), COORDINATOR.verify_key)
    assert Home(home).federation.stat().st_mode & 0o777 == 0o600


def test_what_is_pinned_does_not_expire_and_may_be_joined_again(home):
    content = invite(home)
    accept(home, content)
    accept(home, content, NOW + timedelta(days=1))
    assert load_pinned(home).federation == "lungs"


@pytest.mark.parametrize(
    ("changes", "now", "says"),
    [
        ({"site": "st-john"}, NOW, "this site's own"),
        ({"identity": "00" * 32}, NOW, "this site's own"),
        ({"node_key": "ecdsa-sha2-nistp384 AAAA"}, NOW, "no longer has"),
        ({}, NOW + timedelta(days=31), "expired"),
        ({}, NOW - timedelta(hours=1), "clock"),
        ({"authority": "none"}, NOW, "new invitation"),
        ({"authority": authority_certificate(new_key(), "x", NOW - timedelta(days=9000)).decode()}, NOW, "renew --ca"),
    ],
)
def test_for_this_site_alone(home, changes, now, says):
    content, before = invite(home, **changes), files(home)
    with pytest.raises(EnrolmentError, match=says):
        read_for(home, content, "st-mary", IDENTITY, now)
    assert files(home) == before


def test_tampered(home):
    content = invite(home).replace(b"fed.example.org", b"fed.example.com")
    with pytest.raises(EnrolmentError, match="changed"):
        read_for(home, content, "st-mary", IDENTITY, NOW)


def test_never_older(home):
    first, second = invite(home), invite(home, later=timedelta(hours=1), port=9000)
    accept(home, first)
    accept(home, second, NOW + timedelta(hours=1))
    assert load_pinned(home).port == 9000
    with pytest.raises(EnrolmentError, match="an old file again"):
        read_for(home, first, "st-mary", IDENTITY, NOW + timedelta(hours=1))
    foreign = invite(home, SigningKey(bytes([3]) * 32), timedelta(hours=2))
    with pytest.raises(EnrolmentError, match="another coordinator"):
        read_for(home, foreign, "st-mary", IDENTITY, NOW + timedelta(hours=2))
    assert load_pinned(home).port == 9000


def test_renewed_key_waits_for_the_coordinator(home):
    accept(home, invite(home))
    old = Home(home).node_key.read_bytes()
    make_next_key(home)
    waiting = Home(home).next_key.read_bytes()
    make_next_key(home)  # asked twice: the coordinator may have enrolled the first already
    assert (Home(home).node_key.read_bytes(), Home(home).next_key.read_bytes()) == (old, waiting)
    accept(home, invite(home, later=timedelta(minutes=1)))
    assert Home(home).node_key.read_bytes() == waiting
    assert Home(home).node_pub.read_bytes() == node_public_key(waiting) + b"\n"
    assert not Home(home).next_key.exists()


def test_nothing_to_renew_or_leave_before_joining(home):
    for call in (make_next_key, leave, load_pinned):
        with pytest.raises(EnrolmentError, match="has joined no federation"):
            call(home)


@pytest.mark.parametrize("line", range(5))
def test_any_line(home, monkeypatch, line):
    """Die at each step of a join that brings a new key and a new port; the same call completes it."""
    accept(home, invite(home))
    make_next_key(home)
    content, waiting = invite(home, later=timedelta(minutes=1), port=9000), Home(home).next_key.read_bytes()
    steps = iter(range(10))

    def dies(original):
        def step(*arguments):
            if next(steps) == line:
                raise KeyboardInterrupt
            return original(*arguments)

        return step

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dies(Path.replace))
        patched.setattr(joining, "write_atomic", dies(joining.write_atomic))
        with pytest.raises(KeyboardInterrupt):
            join(home, content)
    assert load_pinned(home).port == 8443
    accept(home, content)
    assert load_pinned(home).port == 9000
    assert Home(home).node_key.read_bytes() == waiting
    assert Home(home).node_pub.read_bytes() == node_public_key(waiting) + b"\n"


def test_no_way_back(home):
    content = invite(home)
    accept(home, content)
    (home / "ledger").mkdir()
    (home / "ledger" / "ledger.head.json").write_text("kept")
    assert leave(home).federation == "lungs"
    assert files(home) == {"ledger.head.json": b"kept"}
    with pytest.raises(EnrolmentError, match="no longer has"):
        read_for(home, content, "st-mary", IDENTITY, NOW)
    accept(home, invite(home, SigningKey(bytes([3]) * 32)))  # free for another federation
    with pytest.raises(EnrolmentError, match="another coordinator"):
        read_for(home, content, "st-mary", IDENTITY, NOW)


def test_a_pin_that_was_changed_is_not_used(home):
    accept(home, invite(home))
    path = Home(home).federation
    path.write_bytes(path.read_bytes().replace(b"fed.example.org", b"fed.example.com"))
    with pytest.raises(StorageError, match="join again"):
        load_pinned(home)


def test_a_node_key_that_others_read_is_not_used(home):
    Home(home).node_key.chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        enrolment_file(home, "st-mary", SITE, NOW)
