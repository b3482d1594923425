"""The two files of an enrolment: what is read is what was signed, and everything else is refused with what to do."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.certificates import authority_certificate, new_key
from common.crypto import SigningKey
from common.enrolment import (
    ENROLMENT_DAYS,
    MAX_DOCUMENT_BYTES,
    MAX_ROSTER,
    Enrolment,
    Invitation,
    Member,
    read_enrolment,
    read_invitation,
    require_current,
    write_enrolment,
    write_invitation,
)
from common.errors import EnrolmentError, ExitCode, FedmedganError, WireError
from common.node_keys import new_node_key, node_public_key

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
SITE, COORDINATOR = SigningKey(bytes([1]) * 32), SigningKey(bytes([2]) * 32)
NODE = node_public_key(new_node_key()).decode()
AUTHORITY = authority_certificate(new_key(), "lungs", NOW).decode()


def hexed(key):
    return key.verify_key.to_bytes().hex()


ENROLMENT = Enrolment(created=NOW, site="st-mary", identity=hexed(SITE), node_key=NODE)
INVITATION = Invitation(
    created=NOW,
    federation="lungs",
    host="fed.example.org",
    port=8443,
    authority=AUTHORITY,
    coordinator=hexed(COORDINATOR),
    site="st-mary",
    identity=hexed(SITE),
    node_key=NODE,
    roster=(Member(site="st-mary", identity=hexed(SITE)),),
    expires=NOW + timedelta(days=30),
)
FILE = write_enrolment(ENROLMENT, SITE)
INVITED = write_invitation(INVITATION, COORDINATOR)


def canonical(tree):
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()


def sealed(kind, document, key):
    signature = key.sign(canonical(document), f"site {kind}").hex()
    return canonical({"kind": kind, "document": document, "signature": signature})


def document(content=FILE, **changes):
    return json.loads(content)["document"] | changes


def test_round_trip():
    assert read_enrolment(FILE, NOW) == ENROLMENT
    assert read_invitation(INVITED) == INVITATION
    require_current(INVITATION, NOW)


def test_one_spelling():
    tree = json.loads(FILE)
    assert read_enrolment(b"  \r\n" + FILE + b"\r\n", NOW) == ENROLMENT
    spellings = [
        json.dumps(tree, sort_keys=True).encode(),
        json.dumps(dict(reversed(tree.items())), separators=(",", ":")).encode(),
        FILE.replace(b'{"document"', b'{"kind":"enrolment","document"'),
        canonical(tree | {"signature": tree["signature"].upper()}),
        canonical(tree | {"signature": tree["signature"][:64] + " " + tree["signature"][64:]}),
        FILE.decode().encode("utf-16"),
        canonical(tree | {"more": 1}),
    ]
    for spelling in spellings:
        assert spelling != FILE.strip()
        with pytest.raises((WireError, EnrolmentError), match="new file"):
            read_enrolment(spelling, NOW)


@pytest.mark.parametrize(
    ("read", "content"),
    [(lambda c: read_enrolment(c, NOW), FILE), (read_invitation, INVITED)],
    ids=["enrolment", "invitation"],  # the files hold keys, which differ between the processes of a test run
)
def test_signed_by_its_identity_and_by_its_coordinator(read, content):
    for position in range(0, len(content) - 1, 7):
        changed = bytearray(content)
        changed[position] ^= 1
        with pytest.raises((WireError, EnrolmentError)):
            read(bytes(changed))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda c: c.replace(b"st-mary", b"st-marx"), ExitCode.ENROLMENT),  # tampered with, or mistyped
        (lambda c: c[:-30], ExitCode.ENROLMENT),  # cut short
        (lambda c: json.dumps(json.loads(c), indent=1).encode(), ExitCode.ENROLMENT),  # an editor saved it
        (lambda c: c.replace(b'"2030', b'"203x'), ExitCode.ENROLMENT),
        (lambda c: c.replace(b'"version":1', b'"version":2'), ExitCode.WIRE),  # of another release
        (lambda _: b"PK\x03\x04", ExitCode.WIRE),  # another file
        (lambda _: b"site = 'st-mary'", ExitCode.WIRE),
    ],
)
def test_a_file_that_was_changed_has_another_code_than_another_file(change, code):
    for content, read in ((FILE, lambda c: read_enrolment(c, NOW)), (INVITED, read_invitation)):
        changed = change(content)
        assert changed != content
        with pytest.raises(FedmedganError) as raised:
            read(changed)
        assert raised.value.exit_code is code, raised.value


def test_a_signature_by_another_key_or_for_another_purpose():
    other = SigningKey(bytes([3]) * 32)
    for key, kind in ((other, "enrolment"), (SITE, "invitation")):
        signature = key.sign(canonical(document()), f"site {kind}").hex()
        with pytest.raises(EnrolmentError, match="signature does not fit"):
            read_enrolment(canonical({"kind": "enrolment", "document": document(), "signature": signature}), NOW)
    with pytest.raises(ValueError):
        write_enrolment(ENROLMENT, other)
    with pytest.raises(ValueError):
        write_invitation(INVITATION, SITE)


def test_the_other_file_is_named():
    with pytest.raises(WireError, match="this is an invitation: the coordinator's, for `fedmedgan-site join`"):
        read_enrolment(INVITED, NOW)
    with pytest.raises(WireError, match="this is an enrolment: a site's, for `fedmedgan-coordinator enrol`"):
        read_invitation(FILE)


def test_a_version_of_the_future_is_named():
    for version in (2, "1", None, True, [1]):
        with pytest.raises(WireError, match="Expected an enrolment of version 1"):
            read_enrolment(sealed("enrolment", document(version=version), SITE), NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "../st-mary"},
        {"site": ""},
        {"site": "a" * 65},
        {"site": 7},
        {"site": "st\u001bmary"},
        {"identity": "00"},
        {"identity": None},
        {"created": "yesterday"},
        {"created": "2030-01-01T00:00:00"},
        {"created": "9999-12-31T23:59:59Z"},
        {"created": "0001-01-01T00:00:00+23:59"},
        {"created": 10**30},
        {"node_key": ""},
        {"node_key": "x" * 600},
        {"node_key": {"a": [1]}},
        {"more": 1},
        {"site": "\ud800"},
    ],
)
def test_values_that_are_none(changes):
    with pytest.raises(EnrolmentError, match="changed on its way"):
        read_enrolment(sealed("enrolment", document(**changes), SITE), NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "fed.example.org/x"},
        {"host": "a b"},
        {"host": "-a.org"},
        {"host": "a..b"},
        {"host": "1.2.3.4.5"},
        {"host": "a." * 130 + "org"},
        {"host": "bücher.example"},
        {"port": 0},
        {"port": 65536},
        {"port": "8443"},
        {"federation": "lungs\n"},
        {"authority": "x" * 17_000},
        {"roster": [{"site": "a"}]},
        {"roster": [{"site": "a", "identity": "00" * 32}] * (MAX_ROSTER + 1)},
    ],
)
def test_invitations_with_values_that_are_none(changes):
    with pytest.raises(EnrolmentError, match="changed on its way"):
        read_invitation(sealed("invitation", document(INVITED, **changes), COORDINATOR))


def test_a_node_key_of_another_form():
    for node_key in ("ssh-ed25519 AAAA", NODE + " me@home"):
        with pytest.raises(EnrolmentError, match="fedmedgan-site enrol"):
            read_enrolment(sealed("enrolment", document(node_key=node_key), SITE), NOW)


def test_time():
    read_enrolment(FILE, NOW - timedelta(minutes=9))
    read_enrolment(FILE, NOW + timedelta(days=ENROLMENT_DAYS))
    with pytest.raises(EnrolmentError, match="clock"):
        read_enrolment(FILE, NOW - timedelta(minutes=11))
    with pytest.raises(EnrolmentError, match="expired"):
        read_enrolment(FILE, NOW + timedelta(days=ENROLMENT_DAYS, seconds=1))
    with pytest.raises(EnrolmentError, match="clock"):
        require_current(INVITATION, NOW - timedelta(minutes=11))
    with pytest.raises(EnrolmentError, match="expired"):
        require_current(INVITATION, NOW + timedelta(days=31))


def test_an_invitation_without_an_authority():
    with pytest.raises(EnrolmentError, match="new invitation"):
        require_current(INVITATION.model_copy(update={"authority": NODE}), NOW)


def test_the_largest_roster_fits():
    roster = tuple(Member(site=f"{number:064d}", identity=hexed(SITE)) for number in range(MAX_ROSTER))
    content = write_invitation(INVITATION.model_copy(update={"roster": roster}), COORDINATOR)
    assert len(read_invitation(content).roster) == MAX_ROSTER


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"1" * 50_000,
        b" " * 100_000,
        b"{" + b'"a":1,' * 9_000,
    ],
)
def test_hostile_bytes(content):
    with pytest.raises(WireError):
        read_enrolment(content, NOW)
    with pytest.raises(WireError):
        read_invitation(content)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.binary(max_size=300)
    | st.recursive(
        st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8
    ).map(lambda tree: canonical({"kind": "enrolment", "document": tree, "signature": "00" * 64}))
)
def test_any_bytes_are_refused_with_a_reason(content):
    with pytest.raises(FedmedganError):
        read_enrolment(content, NOW)


def test_nothing_is_parsed_beyond_the_bound():
    with pytest.raises(WireError, match=str(MAX_DOCUMENT_BYTES)):
        read_enrolment(FILE.strip() + b" " * MAX_DOCUMENT_BYTES, NOW)


def test_hosts_have_one_spelling():
    assert Invitation.model_validate(INVITATION.model_dump() | {"host": "FED.Example.org"}).host == "fed.example.org"
    assert Invitation.model_validate(INVITATION.model_dump() | {"host": "2001:DB8:0::1"}).host == "2001:db8::1"
