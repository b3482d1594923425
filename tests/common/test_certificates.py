"""Certificates as OpenSSL's own TLS sees them: handshakes in memory, without a socket."""

import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from common.certificates import (
    AUTHORITY_DAYS,
    SERVER_DAYS,
    authority_certificate,
    new_key,
    read_authority,
    server_certificate,
    validity,
)
from common.errors import EnrolmentError, StorageError

NOW = datetime.now(UTC).replace(microsecond=0)
HOST = "fed.example.org"


@pytest.fixture(scope="module")
def authority():
    key = new_key()
    return key, authority_certificate(key, "lungs", NOW)


@pytest.fixture(scope="module")
def server(authority):
    key = new_key()
    return key, server_certificate(*authority, key, HOST, NOW)


def handshake(folder, pinned, key, certificate, host):
    """Shake hands as a site that pinned one authority; raises ssl.SSLError as a real connection would."""
    (folder / "server.key").write_bytes(key)
    (folder / "server.pem").write_bytes(certificate)
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shown.load_cert_chain(folder / "server.pem", folder / "server.key")
    trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusted.verify_flags |= ssl.VERIFY_X509_STRICT
    trusted.load_verify_locations(cadata=pinned.decode())
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusted.wrap_bio(down, up, server_hostname=host)
    peer = shown.wrap_bio(up, down, server_side=True)
    for _ in range(6):
        for side in (client, peer):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
    assert client.version() == "TLSv1.3"


@pytest.mark.parametrize("host", [HOST, "localhost", "127.0.0.1"])
def test_holds_for_flower(tmp_path, authority, server, host):
    handshake(tmp_path, authority[1], *server, host)


@pytest.mark.parametrize("host", ["other.example.org", "127.0.0.2", "example.org"])
def test_holds_for_nothing_else(tmp_path, authority, server, host):
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, authority[1], *server, host)


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::1", "127.0.0.1", "localhost"])
def test_addresses_and_names_that_are_there_already(tmp_path, authority, host):
    key = new_key()
    handshake(tmp_path, authority[1], key, server_certificate(*authority, key, host, NOW), host)


def test_another_authority_of_the_same_name_is_not_trusted(tmp_path, server):
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, authority_certificate(new_key(), "lungs", NOW), *server, HOST)


def test_renewed_with_the_same_key(tmp_path):
    key, own, before = new_key(), new_key(), NOW - timedelta(days=3650)
    old, new = authority_certificate(key, "lungs", before), authority_certificate(key, "lungs", NOW)
    assert old != new
    for pinned in (old, new):
        for issuer in (old, new):
            handshake(tmp_path, pinned, own, server_certificate(key, issuer, own, HOST, NOW), HOST)


def test_an_expired_server_is_refused_by_tls(tmp_path, authority):
    key, before = new_key(), NOW - timedelta(days=SERVER_DAYS + 1)
    old = authority_certificate(authority[0], "lungs", before)
    expired = server_certificate(authority[0], old, key, HOST, before)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(tmp_path, authority[1], key, expired, HOST)


def test_no_server_outlives_its_authority(authority):
    late = NOW + timedelta(days=AUTHORITY_DAYS - 10)
    assert validity(server_certificate(*authority, new_key(), HOST, late)).ends == NOW + timedelta(days=AUTHORITY_DAYS)
    with pytest.raises(EnrolmentError, match="renew --ca"):
        server_certificate(*authority, new_key(), HOST, late + timedelta(days=11))


def test_a_key_that_is_not_the_authoritys_is_refused(authority):
    with pytest.raises(StorageError, match="one backup"):
        server_certificate(new_key(), authority[1], new_key(), HOST, NOW)
    with pytest.raises(StorageError) as refused:
        server_certificate(authority[0], authority[1], b"SECRET", HOST, NOW)
    assert "SECRET" not in str(refused.value)


def test_authorities_that_are_none(authority, server):
    held = read_authority(authority[1], NOW)
    assert (held.ends - held.begins).days == AUTHORITY_DAYS + 1
    for wrong in (b"", b"nonsense", server[1], authority[1] * 2, authority[1][:300]):
        with pytest.raises(EnrolmentError, match="new invitation"):
            read_authority(wrong, NOW)
    for when in (NOW - timedelta(days=2), NOW + timedelta(days=AUTHORITY_DAYS + 1)):
        with pytest.raises(EnrolmentError, match="clock"):
            read_authority(authority[1], when)
    with pytest.raises(StorageError):
        validity(b"nonsense")


def test_the_authority_signs_servers_only(authority):
    constraints = x509.load_pem_x509_certificate(authority[1]).extensions
    basic = constraints.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    assert constraints.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
