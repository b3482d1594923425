"""A pinned invitation without an enrolment, for tests of what comes after it."""

import datetime

from client.paths import Home
from common.crypto import SigningKey
from common.enrolment import Invitation, Member, write_invitation

COORDINATOR = SigningKey(bytes(range(32)))


def pin(home: Home, port: int = 9092, ca_pem: bytes = b"", host: str = "127.0.0.1") -> None:
    """Write the pinned invitation, as `join` would; with the home's own node key where there is one."""
    now, identity = datetime.datetime.now(datetime.UTC), SigningKey.generate().verify_key.to_bytes().hex()
    invitation = Invitation(
        created=now,
        federation="test",
        host=host,
        port=port,
        authority=ca_pem.decode(),
        coordinator=COORDINATOR.verify_key.to_bytes().hex(),
        site="st-mary",
        identity=identity,
        node_key=home.node_pub.read_text().strip() if home.node_pub.exists() else "ecdsa-sha2-nistp384 none",
        roster=(Member(site="st-mary", identity=identity),),
        expires=now + datetime.timedelta(days=1),
    )
    home.federation.write_bytes(write_invitation(invitation, COORDINATOR))
