"""The two files of an enrolment: a site's public keys one way, the coordinator's address and keys the other way.

Each is one line of canonical JSON, signed by whoever wrote it; private keys never travel. Out of scope: where they are
kept (client/joining, server/consortium), the words by which people compare keys (common/fingerprint).
"""

import ipaddress
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar, final

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from common.certificates import MAX_CERTIFICATE_CHARS, read_authority
from common.crypto import KEY_BYTES, SIGNATURE_BYTES, SigningKey, VerifyKey
from common.errors import EnrolmentError, WireError
from common.node_keys import MAX_NODE_KEY_CHARS, node_public_pem

VERSION = 1
MAX_DOCUMENT_BYTES = 65_536
MAX_ROSTER = 256
ENROLMENT_DAYS = 30
INVITATION_DAYS = 30
"""How long a file may lie about before it is used. What was pinned or enrolled from it does not run out."""

CLOCK_TOLERANCE = timedelta(minutes=10)

SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Kind = Literal["enrolment", "invitation"]

_WHAT_IT_IS_FOR = {
    "enrolment": "a site's, for `fedmedgan-coordinator enrol`",
    "invitation": "the coordinator's, for `fedmedgan-site join`",
}
_PURPOSE = {"enrolment": "site enrolment", "invitation": "site invitation"}
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_MAX_HOST_CHARS = 253
_FIRST_YEAR, _LAST_YEAR = 2020, 2999
_BEGINS_AS_OURS = re.compile(rb'\{\s*"(document|kind|signature)"')


def _host(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        labels = value.split(".")
        named = all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit()
        if len(value) > _MAX_HOST_CHARS or not named:
            raise ValueError(
                "expected a DNS name (in ASCII, xn--... where it has other letters) or an IP address"
            ) from None
        return value.lower()


def _moment(value: datetime) -> datetime:
    if not _FIRST_YEAR <= value.year <= _LAST_YEAR:  # far from where adding days would overflow
        raise ValueError(f"expected a year from {_FIRST_YEAR} to {_LAST_YEAR}")
    return value.astimezone(UTC)


SiteName = Annotated[str, StringConstraints(pattern=SITE_NAME)]
FederationName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
HexKey = Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{2 * KEY_BYTES}}}$")]
NodeKey = Annotated[str, StringConstraints(pattern=rf"^[ -~]{{1,{MAX_NODE_KEY_CHARS}}}$")]
Host = Annotated[str, AfterValidator(_host)]
Moment = Annotated[AwareDatetime, AfterValidator(_moment)]
Port = Annotated[int, Field(ge=1, le=65_535)]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = VERSION
    created: Moment


_Read = TypeVar("_Read", bound=_Document)


@final
class Enrolment(_Document):
    """What a site tells the coordinator: its name and public keys, and nothing of a patient."""

    site: SiteName
    identity: HexKey
    """The Ed25519 key that signs this file and every reply."""
    node_key: NodeKey
    """By which Flower knows the site's node: EC P-384, OpenSSH's form."""

    @property
    def verify_key(self) -> VerifyKey:
        """Return the site's identity."""
        return VerifyKey(bytes.fromhex(self.identity))


@final
class Member(BaseModel):
    """One site of the roster."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: SiteName
    identity: HexKey


@final
class Invitation(_Document):
    """What the coordinator tells one site: where the server is, whom to trust, and who else takes part."""

    federation: FederationName
    host: Host
    port: Port
    authority: Annotated[str, StringConstraints(max_length=MAX_CERTIFICATE_CHARS)]
    """The certificate of the certificate authority, in PEM."""
    coordinator: HexKey
    """The Ed25519 key that signs this file."""
    site: SiteName
    identity: HexKey
    """Of the site that is invited."""
    node_key: NodeKey
    """The node key that was enrolled, and no other."""
    roster: Annotated[tuple[Member, ...], Field(max_length=MAX_ROSTER)]
    """The sites that were enrolled when this was written, this one among them."""
    expires: Moment

    @property
    def verify_key(self) -> VerifyKey:
        """Return the coordinator's key."""
        return VerifyKey(bytes.fromhex(self.coordinator))


def write_enrolment(enrolment: Enrolment, key: SigningKey) -> bytes:
    """Return the signed file of an enrolment.

    Raises:
        ValueError: The key is not the identity that the enrolment names.
    """
    return _sealed("enrolment", enrolment, enrolment.identity, key)


def read_enrolment(content: bytes, now: datetime) -> Enrolment:
    """Read a site's file and check all that can be checked without knowing the site.

    Raises:
        WireError: Another file was named: too long, no enrolment, or of another version.
        EnrolmentError: It was changed after it was signed, is too old or from the future, or its node key is none.

    Guarantees:
        - one_spelling: Only the bytes that were signed are read, but for white space at both ends.
        - signed_by_its_identity: Whoever wrote the file holds the private key of its identity.
    """
    tree, signature = _opened("enrolment", content)
    enrolment = _parsed("enrolment", Enrolment, tree)
    _verify("enrolment", enrolment.verify_key, tree, signature)
    node_public_pem(enrolment.node_key.encode())
    _require_time("enrolment", enrolment.created, enrolment.created + timedelta(days=ENROLMENT_DAYS), now)
    return enrolment


def write_invitation(invitation: Invitation, key: SigningKey) -> bytes:
    """Return the signed file of an invitation.

    Raises:
        ValueError: The key is not the coordinator that the invitation names.
        WireError: The file would be longer than `read_invitation` takes.
    """
    return _sealed("invitation", invitation, invitation.coordinator, key)


def read_invitation(content: bytes) -> Invitation:
    """Read the coordinator's file; whether it may be used now is `require_current`'s matter.

    Raises:
        WireError: Another file was named: too long, no invitation, or of another version.
        EnrolmentError: It was changed after it was signed.

    Guarantees:
        - one_spelling: Only the bytes that were signed are read, but for white space at both ends.
        - signed_by_its_coordinator: Whoever wrote the file holds the private key of its coordinator.
    """
    tree, signature = _opened("invitation", content)
    invitation = _parsed("invitation", Invitation, tree)
    _verify("invitation", invitation.verify_key, tree, signature)
    return invitation


def require_current(invitation: Invitation, now: datetime) -> None:
    """Refuse an invitation that may not be used now.

    Raises:
        EnrolmentError: It is expired or from the future, or its certificate authority is none or does not hold.
    """
    _require_time("invitation", invitation.created, invitation.expires, now)
    read_authority(invitation.authority.encode(), now)


def _sealed(kind: Kind, document: _Document, signer: str, key: SigningKey) -> bytes:
    if key.verify_key.to_bytes().hex() != signer:
        raise ValueError(f"Expected the key that the {kind} names as its signer.")
    tree = document.model_dump(mode="json")
    signature = key.sign(_canonical(tree), _PURPOSE[kind]).hex()
    content = _canonical({"kind": kind, "document": tree, "signature": signature}) + b"\n"
    if len(content) > MAX_DOCUMENT_BYTES:
        raise WireError(
            f"Expected an {kind} of at most {MAX_DOCUMENT_BYTES} bytes, got {len(content)}: too many sites."
        )
    return content


def _opened(kind: Kind, content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return what was signed and its signature; bounded before anything is parsed."""
    if len(content) > MAX_DOCUMENT_BYTES:
        raise WireError(f"Expected an {kind} of at most {MAX_DOCUMENT_BYTES} bytes. {_again(kind)}")
    text = content.strip()
    try:
        tree = json.loads(text)
        plain = isinstance(tree, dict) and set(tree) == {"kind", "document", "signature"} and _canonical(tree) == text
        signature = bytes.fromhex(tree["signature"]) if plain else b""
        found = tree["kind"] if plain and tree["signature"] == signature.hex() else None
    except (ValueError, TypeError, RecursionError):
        found, signature, tree = None, b"", {}
    if found == kind and isinstance(tree["document"], dict) and len(signature) == SIGNATURE_BYTES:
        return tree["document"], signature
    if isinstance(found, str) and found in _WHAT_IT_IS_FOR and found != kind:
        raise WireError(f"Expected an {kind}, this is an {found}: {_WHAT_IT_IS_FOR[found]}. Name the other file.")
    if _BEGINS_AS_OURS.match(text):
        raise EnrolmentError(f"The {kind} was changed on its way: not a letter may differ. {_again(kind)}")
    raise WireError(f"This is no {kind}: another file was named, or not much is left of it. {_again(kind)}")


def _parsed(kind: Kind, model: type[_Read], tree: dict[str, Any]) -> _Read:
    version = tree.get("version")
    if type(version) is not int or version != VERSION:
        raise WireError(
            f"Expected an {kind} of version {VERSION}, this is of version {str(version)[:16]!r}. Both "
            "sides install the same release."
        )
    try:
        return model.model_validate_json(_canonical(tree), strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:64]
        raise EnrolmentError(
            f"The {kind} was changed on its way: it does not hold what it must: {where!r}: {first['msg']}. "
            f"{_again(kind)}"
        ) from error


def _verify(kind: Kind, key: VerifyKey, tree: dict[str, Any], signature: bytes) -> None:
    try:
        key.verify(_canonical(tree), signature, _PURPOSE[kind])
    except WireError as error:
        raise EnrolmentError(
            f"The {kind} was changed on its way, or another key signed it: the signature does not fit. {_again(kind)}"
        ) from error


def _require_time(kind: Kind, begins: datetime, ends: datetime, now: datetime) -> None:
    if now < begins - CLOCK_TOLERANCE:
        raise EnrolmentError(
            f"The {kind} was made at {begins:%Y-%m-%d %H:%M} UTC, here it is {now:%Y-%m-%d %H:%M}. Mend the clock "
            "that is wrong; if it is the other side's, ask for a new file."
        )
    if now > ends:
        raise EnrolmentError(f"The {kind} expired at {ends:%Y-%m-%d %H:%M} UTC. {_again(kind)}")


def _again(kind: Kind) -> str:
    if kind == "enrolment":
        return "Ask the site for a new file: `fedmedgan-site enrol`."
    return "Ask the coordinator for a new file: `fedmedgan-coordinator enrol`."


def _canonical(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
