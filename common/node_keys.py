"""The key by which Flower knows a site's node: EC P-384, one per node.

Out of scope: identities and signatures (common/crypto), who is enrolled (common/enrolment).
"""

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from common.errors import EnrolmentError, StorageError

MAX_NODE_KEY_CHARS = 512


def new_node_key() -> bytes:
    """Make the private key of a node: EC P-384 in OpenSSH's form, the one form that Flower reads."""
    return generate_ec_key(SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


NodeKey = EllipticCurvePrivateKey
"""By which Flower knows a site's node."""


def load_node_key(private: bytes) -> EllipticCurvePrivateKey:
    """Read the private key of a node.

    Raises:
        StorageError: It is not an EC P-384 key in OpenSSH's form without a passphrase.
    """
    try:
        key = load_ssh_private_key(private, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None  # said below, without the content: it is a secret
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise StorageError(
            "The node key is not an EC P-384 key in OpenSSH's form. Delete it, then `fedmedgan-site enrol` makes a new "
            "one for the coordinator to enrol."
        )
    return key


def node_public_key(private: bytes) -> bytes:
    """Return the public key of a node, one line in OpenSSH's form without a comment; raises as `load_node_key`."""
    return load_node_key(private).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def node_public_pem(public: bytes) -> bytes:
    """Return a node's public key as PEM, in which Flower's control API takes it.

    Args:
        public: One line in OpenSSH's form, at most `MAX_NODE_KEY_CHARS` long, without a comment.

    Raises:
        EnrolmentError: It is no EC P-384 key in exactly that form.
    """
    try:
        key = load_ssh_public_key(public) if len(public) <= MAX_NODE_KEY_CHARS else None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise EnrolmentError(
            "The node key is not an EC P-384 public key in OpenSSH's form. The site makes a new file with "
            "`fedmedgan-site enrol`."
        )
    if key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) != public:
        raise EnrolmentError(
            "The node key carries a comment or another spelling, by which one key could pass for two. The site makes a "
            "new file with `fedmedgan-site enrol`."
        )
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
