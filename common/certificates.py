"""TLS certificates of the coordinator: one certificate authority per federation, one server certificate below it.

Out of scope: the keys of nodes (common/node_keys), identities and signatures (common/crypto).
"""

import ipaddress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError, EnrolmentError, StorageError

AUTHORITY_DAYS = 7305
"""Twenty years: a site trusts the certificate that it pinned until that one's own end."""

SERVER_DAYS = 397
"""What clients accept at most of public servers; a private one has no reason for more."""

MAX_CERTIFICATE_CHARS = 16_384

MAX_EXTRA_AUTHORITIES = 4
_ISSUER_CHARS = 120

_EARLIER = timedelta(days=1)
"""Clocks of sites may be behind: a certificate made this minute must hold there too."""

_COMMON_NAME_CHARS = 64


@final
@dataclass(frozen=True)
class Validity:
    """From when to when a certificate holds, in UTC."""

    begins: datetime
    ends: datetime


def new_key() -> bytes:
    """Make a private key of a certificate, EC P-384, as PKCS 8 in PEM."""
    return generate_ec_key(SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def authority_certificate(key: bytes, federation: str, now: datetime) -> bytes:
    """Make the certificate of a federation's own certificate authority.

    Args:
        key: The authority's private key, as `new_key` made it.
        federation: The name of the federation; cut to what a certificate's name can hold.
        now: The certificate holds from a day before for `AUTHORITY_DAYS`.

    Returns:
        The certificate in PEM.

    Raises:
        StorageError: The key is none.

    Guarantees:
        - renewed_with_the_same_key: A later certificate of the same key and name is trusted where the earlier one is
          pinned, and the other way round, as long as the pinned one holds.
    """
    private = _private(key, "the key of the certificate authority")
    name = _name(f"fedmedgan {federation}")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, private.public_key(), now, now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .sign(private, SHA384())
    )
    return certificate.public_bytes(Encoding.PEM)


def server_certificate(authority_key: bytes, authority: bytes, key: bytes, host: str, now: datetime) -> bytes:
    """Make the certificate that the coordinator's server shows.

    Args:
        authority_key: The private key of the certificate authority.
        authority: Its certificate, in PEM.
        key: The server's own private key.
        host: The public DNS name or IP address by which sites reach the server.
        now: The certificate holds from a day before for `SERVER_DAYS`, never longer than the authority.

    Returns:
        The certificate in PEM.

    Raises:
        StorageError: A key is none, or the authority's key is not that of its certificate.
        EnrolmentError: The authority's certificate does not hold now.

    Guarantees:
        - holds_for_flower: It holds for the host, for `localhost` and for 127.0.0.1, where Flower's own processes on
          the coordinator's machine connect, and for nothing else.
    """
    signer, own = _private(authority_key, "the key of the certificate authority"), _private(key, "the server's key")
    ends = min(read_authority(authority, now).ends, now + timedelta(days=SERVER_DAYS))
    issuer = x509.load_pem_x509_certificate(authority)
    if issuer.public_key() != signer.public_key():
        raise StorageError("The key of the certificate authority is not that of ca.pem. Restore both from one backup.")
    names = list(dict.fromkeys([_general_name(host), x509.DNSName("localhost"), _general_name("127.0.0.1")]))
    certificate = (
        _builder(_name("fedmedgan coordinator"), issuer.subject, own.public_key(), now, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, SHA384())
    )
    return certificate.public_bytes(Encoding.PEM)


def read_authority(certificate: bytes, now: datetime) -> Validity:
    """Check that a PEM holds one certificate of a certificate authority that is valid now.

    Raises:
        EnrolmentError: It is none, is signed by another, belongs to no authority or does not hold now.
    """
    try:
        found = x509.load_pem_x509_certificates(certificate[: MAX_CERTIFICATE_CHARS + 1])
        constraints = found[0].extensions.get_extension_for_class(x509.BasicConstraints).value
        found[0].verify_directly_issued_by(found[0])
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        raise EnrolmentError(
            "The certificate of the certificate authority cannot be read. Ask the coordinator for a new invitation."
        ) from error
    if len(found) != 1 or not constraints.ca:
        raise EnrolmentError(
            "Expected exactly one certificate, of a certificate authority. Ask the coordinator for a new invitation."
        )
    held = Validity(found[0].not_valid_before_utc, found[0].not_valid_after_utc)
    if not held.begins <= now <= held.ends:
        raise EnrolmentError(
            f"The certificate authority holds from {held.begins:%Y-%m-%d} to {held.ends:%Y-%m-%d}, now is "
            f"{now:%Y-%m-%d}. Mend this machine's clock; if it is right, the coordinator runs "
            "`fedmedgan-coordinator renew --ca`."
        )
    return held


def extra_authorities(certificates: bytes) -> tuple[bytes, ...]:
    """Return the certificates of authorities that a site trusts beside its pinned one, each in PEM and nothing else.

    Raises:
        ConfigError: There is none or more than `MAX_EXTRA_AUTHORITIES`, or one cannot be read or is no authority's.

    Guarantees:
        - never_all_the_world: A system's whole list of public authorities is refused.
    """
    try:
        found = x509.load_pem_x509_certificates(certificates)
        able = [one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca for one in found]
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        raise ConfigError(
            "The extra CA is no certificate of an authority in PEM. Ask who runs the proxy that inspects TLS for its "
            "root certificate in PEM."
        ) from error
    if not all(able) or len(found) > MAX_EXTRA_AUTHORITIES:
        raise ConfigError(
            f"Expected the extra CA to hold at most {MAX_EXTRA_AUTHORITIES} certificates, each an authority's; got "
            f"{len(found)}, {sum(able)} of them an authority's. Keep only that of the proxy that inspects TLS."
        )
    return tuple(one.public_bytes(Encoding.PEM) for one in found)


def issuer(certificate: bytes) -> str:
    """Return who says to have issued a certificate, in DER; not verified, ASCII and short, to be shown to a person."""
    try:
        name = x509.load_der_x509_certificate(certificate).issuer.rfc4514_string()
    except ValueError:
        name = "unknown"
    return ascii(name)[1:-1][:_ISSUER_CHARS]


def validity(certificate: bytes) -> Validity:
    """Return from when to when a certificate holds.

    Raises:
        StorageError: It is no certificate in PEM.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise StorageError("A certificate cannot be read. Make it anew: `fedmedgan-coordinator renew`.") from error
    return Validity(found.not_valid_before_utc, found.not_valid_after_utc)


def _private(key: bytes, what: str) -> EllipticCurvePrivateKey:
    try:
        read = load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        read = None  # said below, without the content: it is a secret
    if not isinstance(read, EllipticCurvePrivateKey):
        raise StorageError(f"Expected an EC key in PEM as {what}. Restore it from a backup.")
    return read


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey, now: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(ends)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:_COMMON_NAME_CHARS])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
