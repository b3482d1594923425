"""Connecting to a PACS by DIMSE, with or without TLS, and why it did not work. Source: PS3.8 9.3.4 (rejections)."""

import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pynetdicom import AE, build_role
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.presentation import PresentationContext

from client.pull.sources import MAX_SECRET_BYTES, DimseSource
from client.pull.storage import MAX_PDU, Receiver
from common.errors import ConfigError, PacsError
from common.files import read_secret

VERIFICATION: Final = "1.2.840.10008.1.1"
FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
MOVE: Final = "1.2.840.10008.5.1.4.1.2.2.2"
GET: Final = "1.2.840.10008.5.1.4.1.2.2.3"
CONNECT_S: Final = 20.0
_SERVICES: Final = {VERIFICATION: "C-ECHO", FIND: "C-FIND", MOVE: "C-MOVE", GET: "C-GET"}
_CALLING_UNKNOWN, _CALLED_UNKNOWN = 3, 7


def associate(
    source: DimseSource,
    receiver: Receiver,
    tls: ssl.SSLContext | None,
    contexts: Sequence[PresentationContext],
    roles: Sequence[str] = (),
) -> Association:
    """Connect to the PACS.

    Args:
        source: Where it is, and who we are.
        receiver: What may come over the connection.
        tls: How to trust it, or None for plain TCP.
        contexts: What is asked for; the first is the service itself.
        roles: SOP classes that the PACS may send to us over this connection.

    Raises:
        PacsError: It is out of reach, refuses us, or does not offer the service; the message says what to do.

    Guarantees:
        - no_answer_is_lost: Each answer of the PACS reaches whom it was sent to.
        - a_rejection_is_told_even_if_we_look_late: Why the PACS rejects us is in the message.
    """
    entity = AE(ae_title=source.our_aet)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = source.timeout_s
    entity.connection_timeout = min(source.timeout_s, CONNECT_S)
    association = entity.associate(
        _address(source),
        source.port,
        contexts=list(contexts),
        ae_title=source.aet,
        max_pdu=MAX_PDU // 2,
        ext_neg=[build_role(kind, scp_role=True) for kind in roles],
        evt_handlers=receiver.handlers(),
        tls_args=(tls, source.host) if tls is not None else None,
    )
    if not association.is_established:
        raise _why_not(source, association, tls)
    _leave_answers(association)
    service = contexts[0].abstract_syntax
    if not any(context.abstract_syntax == service for context in association.accepted_contexts):
        end(association)
        raise PacsError(
            f"{named(source)} does not offer {_SERVICES[str(service)]} to {source.our_aet}. Ask its administrator to "
            'allow it; pacs.toml has method = "get" and "move".'
        )
    return association


def _leave_answers(association: Association) -> None:
    """Keep the thread of an association from taking answers, which are for whoever asked.

    It looks for requests of the PACS whenever it is not paused, and looks whether it is paused an instant before: where
    it wakes late, on a busy machine, it takes an answer that has come meanwhile and drops it without a word.
    """
    take = association.dimse.get_msg

    def get_msg(block: bool = False) -> Any:  # only that thread does not wait
        return take(block=True) if block else (None, None)

    association.dimse.get_msg = get_msg


def end(association: Association) -> None:
    """Release an association that still stands."""
    if association.is_established:
        association.release()


def named(source: DimseSource) -> str:
    """Return how messages name the PACS."""
    return f"{source.aet} at {source.host}:{source.port}"


def make_tls(source: DimseSource, *, server: bool) -> ssl.SSLContext | None:
    """Return how to trust the PACS, and to show who we are; None where the source speaks plain TCP.

    Raises:
        ConfigError: A file of the source does not load.
        StorageError: Others than its owner may read the key.
    """
    if source.tls_ca is None:
        return None
    try:
        purpose = ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH
        context = ssl.create_default_context(purpose, cafile=source.tls_ca)
        context.verify_mode = ssl.CERT_REQUIRED
        if source.tls_cert is not None and source.tls_key is not None:
            read_secret(Path(source.tls_key), MAX_SECRET_BYTES)  # refuses a key that others may read
            context.load_cert_chain(source.tls_cert, source.tls_key)
    except OSError as error:
        raise ConfigError(f"tls_ca, tls_cert or tls_key of pacs.toml do not load: {error.strerror or error}.") from None
    return context


def _address(source: DimseSource) -> str:
    try:
        entries = socket.getaddrinfo(source.host, source.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise PacsError(f"The name {source.host} does not resolve: {error.strerror}. Mend host in pacs.toml.") from None
    return str(min(entries, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def _why_not(source: DimseSource, association: Association, tls: ssl.SSLContext | None) -> PacsError:
    # Where the PACS hangs up after its rejection before pynetdicom has looked whether it is connected, the answer waits
    answer = association.acceptor.primitive if association.is_rejected else association.dul.receive_pdu(wait=False)
    if isinstance(answer, A_ASSOCIATE) and answer.result:
        if answer.diagnostic == _CALLING_UNKNOWN:
            return PacsError(
                f"{named(source)} does not know our AE title {source.our_aet}. Register it at the PACS, with this "
                "machine's address, or mend our_aet in pacs.toml."
            )
        if answer.diagnostic == _CALLED_UNKNOWN:
            return PacsError(f"{source.host}:{source.port} does not call itself {source.aet}. Mend aet in pacs.toml.")
        return PacsError(f"{named(source)} rejects the connection. It may be busy, or allow us nothing: ask there.")
    reachable = _try(source)
    if reachable is not None:
        return PacsError(f"{named(source)} is out of reach: {reachable}. Mend host and port, or ask the network.")
    hint = "TLS fails: mend tls_ca, tls_cert and tls_key" if tls is not None else "if it speaks TLS, set tls_ca"
    return PacsError(
        f"{named(source)} takes the connection and breaks it off. Register our AE title {source.our_aet} with this "
        f"machine's address there; {hint}."
    )


def _try(source: DimseSource) -> str | None:
    """Return what the operating system says of a connection; None where it is taken."""
    try:
        with socket.create_connection((source.host, source.port), timeout=5):
            return None
    except OSError as error:
        return error.strerror or "no answer in 5 s"
