"""The coordinator's home: who is enrolled, who is refused with what to do, and what renewing changes."""

import json
import ssl
from datetime import UTC, datetime, timedelta

import pytest

from common.certificates import read_authority, validity
from common.crypto import SigningKey, load_key
from common.enrolment import MAX_ROSTER, Enrolment, read_invitation, require_current, write_enrolment
from common.errors import ConfigError, EnrolmentError, StorageError
from common.node_keys import new_node_key, node_public_key
from server.consortium import FederationConfig, enrolled, load_consortium, read_settings
from server.enrol import create_consortium, enrol, read_candidate, renew, revoke

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
SETTINGS = FederationConfig(name="lungs", host="fed.example.org")
MARY, JOHN = SigningKey(bytes([1]) * 32), SigningKey(bytes([2]) * 32)
NODES = [node_public_key(new_node_key()).decode() for _ in range(3)]


@pytest.fixture
def consortium(tmp_path):
    return create_consortium(tmp_path / "coordinator", SETTINGS, NOW)


def file(site="st-mary", key=MARY, node=0, later=timedelta()):
    identity = key.verify_key.to_bytes().hex()
    return write_enrolment(Enrolment(created=NOW + later, site=site, identity=identity, node_key=NODES[node]), key)


def admit(consortium, content, later=timedelta(), readmit=False):
    found = read_candidate(consortium, content, NOW + later, readmit)
    return found.known, read_invitation(enrol(consortium, found.enrolment, NOW + later))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_secrets_of_its_owner(consortium):
    modes = {path.name: path.stat().st_mode & 0o777 for path in consortium.folder.rglob("*") if path.is_file()}
    private = {"ca.key", "server.key", "coordinator.json", "control.token", "superexec.secret"}
    assert {name for name, mode in modes.items() if mode == 0o600} == private
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in (consortium.folder, consortium.sites))
    assert consortium.control_token.read_bytes() != consortium.superexec_secret.read_bytes()
    assert len(consortium.control_token.read_bytes()) == 64
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(consortium.server_pem, consortium.server_key)


def test_a_home_is_made_once_and_taken_up_where_it_was_left(consortium):
    with pytest.raises(StorageError, match="already"):
        create_consortium(consortium.folder, SETTINGS, NOW)
    key = consortium.key.read_bytes()
    consortium.settings.unlink()
    create_consortium(consortium.folder, SETTINGS, NOW)
    assert consortium.key.read_bytes() == key


def test_settings_are_read_back_and_checked(consortium, tmp_path):
    assert read_settings(load_consortium(consortium.folder)) == SETTINGS
    assert consortium.database == consortium.folder / "link.db"
    with pytest.raises(StorageError, match="init"):
        load_consortium(tmp_path)
    good = consortium.settings.read_text()
    for wrong in ("prot = 1", "port = 8444", "port = 0", 'host = "a b"', 'database = "../x.db"', "= ["):
        key = wrong.split(" ")[0]
        kept = [line for line in good.splitlines() if not line.startswith(f"{key} ")]
        consortium.settings.write_text("\n".join([*kept, wrong]))
        with pytest.raises(ConfigError):
            load_consortium(consortium.folder)
    consortium.settings.write_text(good.replace("fed.example.org", "2001:db8::1"))
    assert read_settings(consortium).address == "[2001:db8::1]:8443"


def test_enrolled_and_invited(consortium):
    assert enrolled(consortium) == {}
    known, invitation = admit(consortium, file())
    assert not known
    require_current(invitation, NOW)
    assert invitation.verify_key == load_key(consortium.key).verify_key
    assert (invitation.host, invitation.port, invitation.federation) == ("fed.example.org", 8443, "lungs")
    assert invitation.authority.encode() == consortium.ca_pem.read_bytes()
    site = enrolled(consortium)["st-mary"]
    assert (site.name, site.verify_key, site.revoked) == ("st-mary", MARY.verify_key, False)
    assert site.node_public_key == NODES[0].encode()


def test_a_second_site_changes_no_file_of_the_first(consortium):
    admit(consortium, file())
    before = files(consortium.folder)
    _, invitation = admit(consortium, file("st-john", JOHN, 1))
    after = files(consortium.folder)
    assert set(after) - set(before) == {"sites/st-john.json"}
    assert before.items() <= after.items()
    assert [member.site for member in invitation.roster] == ["st-john", "st-mary"]
    admit(consortium, file("st-john", JOHN, 2, HOUR), HOUR)  # a renewed node key
    assert enrolled(consortium)["st-john"].node_public_key == NODES[2].encode()
    assert before.items() <= files(consortium.folder).items()
    revoke(consortium, "st-john", NOW + HOUR)
    assert before.items() <= files(consortium.folder).items()


def test_the_same_file_again_gives_another_invitation(consortium):
    admit(consortium, file())
    known, invitation = admit(consortium, file(), HOUR)
    assert known
    assert invitation.created == NOW + HOUR


def test_a_new_node_key_of_the_same_identity(consortium):
    admit(consortium, file())
    known, _ = admit(consortium, file(node=1, later=HOUR), HOUR)
    assert known
    assert enrolled(consortium)["st-mary"].node_public_key == NODES[1].encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (file(later=-HOUR), "an old file again"),
        (file(node=1), "an old file again"),
        (file(key=JOHN, node=1), "another identity"),
        (file("ST-Mary", JOHN, 1), "upper and lower case"),
        (file("st-john", MARY, 1), "a home was copied"),
        (file("st-john", JOHN, 0), "a home was copied"),
        (file(later=timedelta(days=-40)), "expired"),
        (file(later=HOUR), "clock"),
        (file("st-john", JOHN, 1)[:-20], "changed on its way"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",  # keys differ between the test processes
)
def test_one_name_one_key_never_older(consortium, content, says):
    admit(consortium, file())
    before = files(consortium.folder)
    with pytest.raises(EnrolmentError, match=says):
        read_candidate(consortium, content, NOW)
    assert files(consortium.folder) == before


def test_revoked_for_good_unless_readmitted(consortium):
    admit(consortium, file())
    revoke(consortium, "st-mary", NOW + HOUR)
    assert enrolled(consortium)["st-mary"].revoked
    late = file(node=1, later=2 * HOUR)
    for content, readmit, says in (
        (file(), False, "--readmit"),
        (late, False, "--readmit"),
        (file(), True, "before the site was revoked"),
        (file(later=2 * HOUR), True, "the node key that was revoked"),
    ):
        with pytest.raises(EnrolmentError, match=says):
            read_candidate(consortium, content, NOW + 2 * HOUR, readmit)
    with pytest.raises(EnrolmentError, match="a home was copied"):
        read_candidate(consortium, file("st-john", MARY, 1), NOW)
    known, _ = admit(consortium, late, 2 * HOUR, readmit=True)
    assert not known  # words are compared again
    assert not enrolled(consortium)["st-mary"].revoked


def test_a_lost_home_comes_back_by_readmission(consortium):
    admit(consortium, file())
    revoke(consortium, "st-mary", NOW)
    admit(consortium, file(key=JOHN, node=1, later=HOUR), HOUR, readmit=True)
    assert enrolled(consortium)["st-mary"].verify_key == JOHN.verify_key


def test_revoked_sites_are_not_on_the_roster(consortium):
    admit(consortium, file())
    revoke(consortium, "st-mary", NOW)
    assert [member.site for member in admit(consortium, file("st-john", JOHN, 1))[1].roster] == ["st-john"]


def test_names_that_were_never_enrolled_or_are_revoked(consortium):
    admit(consortium, file())
    with pytest.raises(EnrolmentError, match="Enrolled: st-mary"):
        revoke(consortium, "../st-mary", NOW)
    revoke(consortium, "st-mary", NOW)
    with pytest.raises(EnrolmentError, match="already"):
        revoke(consortium, "st-mary", NOW)


def test_a_broken_record_lets_nobody_in(consortium):
    admit(consortium, file())
    path = consortium.site("st-mary")
    good = path.read_text()
    for wrong in ("", "{}", good.replace('"node_key"', '"key"'), json.dumps(json.loads(good) | {"more": 1})):
        path.write_text(wrong)
        with pytest.raises(StorageError, match="enrol the site again"):
            enrolled(consortium)
    path.write_text(good)
    path.rename(consortium.site("st-john"))
    with pytest.raises(StorageError, match="renamed"):
        enrolled(consortium)


def test_too_many_sites(consortium):
    admit(consortium, file())
    record = json.loads(consortium.site("st-mary").read_text())
    for number in range(MAX_ROSTER - 1):
        other = record | {"name": f"s{number}", "identity": f"{number:064x}", "node_key": f"key {number}"}
        consortium.site(f"s{number}").write_text(json.dumps(other))
    admit(consortium, file(later=HOUR / 10), HOUR)
    with pytest.raises(EnrolmentError, match=f"at most {MAX_ROSTER}"):
        read_candidate(consortium, file("st-john", JOHN, 1), NOW)


def test_without_new_kits(consortium):
    admit(consortium, file())
    before, later = files(consortium.folder), timedelta(days=400)
    held = renew(consortium, NOW + later)
    changed = {name for name, content in files(consortium.folder).items() if before[name] != content}
    assert changed == {"server.pem"}
    assert held.ends > NOW + later + timedelta(days=390)
    renew(consortium, NOW + later, authority=True)
    changed = {name for name, content in files(consortium.folder).items() if before[name] != content}
    assert changed == {"server.pem", "ca.pem"}  # what TLS makes of the two: tests/common/test_certificates
    assert read_authority(consortium.ca_pem.read_bytes(), NOW + later).ends > NOW + timedelta(days=7305)


def test_renewing_follows_the_host_and_makes_a_server_key_that_was_deleted(consortium):
    consortium.settings.write_text(consortium.settings.read_text().replace("fed.example.org", "new.example.org"))
    consortium.server_key.unlink()
    renew(consortium, NOW)
    assert b"new.example.org" in ssl.PEM_cert_to_DER_cert(consortium.server_pem.read_text())
    assert consortium.server_key.stat().st_mode & 0o777 == 0o600
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(consortium.server_pem, consortium.server_key)


def test_an_authority_that_ran_out(consortium):
    late = NOW + timedelta(days=7400)
    with pytest.raises(EnrolmentError, match="renew --ca"):
        renew(consortium, late)
    with pytest.raises(EnrolmentError, match="renew --ca"):
        enrol(consortium, Enrolment(created=late, site="a", identity="00" * 32, node_key=NODES[0]), late)
    assert enrolled(consortium) == {}
    renew(consortium, late, authority=True)
    assert validity(consortium.server_pem.read_bytes()).ends > late
