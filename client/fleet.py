"""The line to the coordinator's link, by Flower's Fleet protocol: TLS, node authentication, heartbeats, retries.

With common/parts the only module of the hospital that uses Flower's internals; tests/contracts/test_fleet.py pins them.
Flower's own SuperNode would fetch the bundle, read its configuration and offer both to an executor on a local port.
Here nothing of a bundle is fetched, except to compare its digest when the site keeps a list of bundles, and no port is
opened. Out of scope: what is done with a message (client/relay).
"""

import hashlib
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any, cast, final
from urllib.request import getproxies

from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import http_request_response
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from httpx import ConnectError, HTTPError, InvalidURL, ProxyError, Request, Response, SyncByteStream

from client.refusals import PROXY_EXPECTED, answered, explained
from common.errors import ConfigError, FederationError, WireError
from common.node_keys import NodeKey
from common.parts import MADE_UP, MAX_OBJECTS, fetch_parts

RunEnded = RunNotRunningException
"""The run is over: its messages and replies are of no use any more."""

INVALID_BUNDLE = ErrorCode.INVALID_FAB
UNKNOWN_REQUEST = ErrorCode.LOAD_CLIENT_APP_EXCEPTION
FAILED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION

MAX_BODY_BYTES = 16 << 20
"""Of one answer of the link: a chunk of 5 MB, or a bundle of at most 10 MiB."""


@final
class BoundedClient(FleetHttpClient):
    """Flower's client for the Fleet API, which reads of an answer what is asked for and no more.

    Guarantees:
        - bounded_body: An answer over MAX_BODY_BYTES, declared or not, is given up at that byte; a packed one, which
          may be of any size once unpacked, before its first.
        - goes_nowhere_else: An answer that points to another address is not followed.
        - cut_is_no_refusal: A connection that is cut while it is made, or to which a proxy finds no way, is tried
          again by Flower like one that is refused; what is wrong with a certificate is told at once.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Connect as Flower's client does.

        Raises:
            ConfigError: The environment names a proxy that cannot be used.
        """
        try:
            super().__init__(*arguments, **named)
        except (ImportError, ValueError, InvalidURL):  # by which httpx says so, with the password in one of them
            if not getproxies():
                raise
            raise ConfigError(PROXY_EXPECTED) from None
        self._client.follow_redirects = False
        self._client.event_hooks = {"request": [_ask_plainly], "response": [_bound_body]}

    def _send(self, *arguments: Any, **named: Any) -> Response:
        """Send a request; Flower gives up at any failure whose text speaks of TLS, a cut in a handshake among them."""
        try:
            return super()._send(*arguments, **named)
        except (ConnectError, ProxyError) as error:
            if _will_pass(error):
                raise ConnectError(_CUT) from error
            raise


fleet_http_connection.FleetHttpClient = BoundedClient
"""The line of `join` is made by Flower, by this name."""


_CUT = "the connection was cut while it was made"
_NO_WAY = ("502", "503", "504")
"""A proxy's codes when the link is away, or the line behind the proxy is."""


def _will_pass(error: ConnectError | ProxyError) -> bool:
    if isinstance(error, ProxyError):
        return str(error).startswith(_NO_WAY)
    cause: BaseException | None = error
    while cause and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    return isinstance(cause, ssl.SSLEOFError)


@final
class _BoundedBody(SyncByteStream):
    def __init__(self, stream: SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size_bytes = 0
        for part in self._stream:
            size_bytes += len(part)
            _check_body(size_bytes)
            yield part

    def close(self) -> None:
        self._stream.close()


def _ask_plainly(request: Request) -> None:
    request.headers["accept-encoding"] = "identity"


def _bound_body(response: Response) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise WireError("Expected an answer of the link that is not packed.")
    declared = response.headers.get("content-length", "0")
    _check_body(int(declared) if declared.isdecimal() else 0)
    response.stream = _BoundedBody(cast("SyncByteStream", response.stream))


def _check_body(size_bytes: int) -> None:
    if size_bytes > MAX_BODY_BYTES:
        raise WireError(f"Expected an answer of the link of at most {MAX_BODY_BYTES} bytes.")


@final
class Fleet:
    """An open line to the link, as one node."""

    def __init__(self, line: "_Line") -> None:
        self.node_id, self._receive, self._send, self._get_run, self._get_fab, self._pull, self._push, self._done = line
        self._runs: dict[int, Run] = {}

    def receive(self) -> "tuple[Message, ObjectTree] | None":
        """Return the next message's envelope and the tree of its parts, or None. The content is still at the link."""
        return self._receive()

    def content(self, envelope: Message, tree: ObjectTree) -> Message:
        """Fetch a message's content, its size bounded while it comes and before it is put together.

        Raises:
            WireError: It has too many parts or bytes, lists a chunk twice, does not decode, or is stale by the
                time it is here.
        """
        started, run_id = time.monotonic(), envelope.metadata.run_id
        parts = fetch_parts(_object_ids(tree), partial(self._pull, run_id), envelope.metadata.ttl)
        self._done(run_id, envelope.metadata.message_id)  # the link drops the parts; only now may it
        if time.monotonic() - started > envelope.metadata.ttl:
            raise WireError(f"The message took longer to come than its {envelope.metadata.ttl:.0f} s to live.")
        try:
            message = inflate_object_from_contents(tree.object_id, parts)
        except MADE_UP as error:
            raise WireError(f"Expected a message, its parts do not decode: {type(error).__name__}.") from error
        if not isinstance(message, Message) or not message.has_content():
            raise WireError("Expected a message with content.")
        # The envelope is what the link routed; the content's own copy of it is the sender's word only.
        return make_message(envelope.metadata, message.content)

    def is_agent_task(self, run_id: int) -> bool:
        """Return whether a run is one of Flower's agents: a language model with tools, not a federation."""
        return self._run(run_id).primary_task_type not in ("", TaskType.SERVER_APP, TaskType.SIMULATION)

    def bundle(self, run_id: int) -> str:
        """Fetch a run's bundle, never to be opened, and return its SHA-256 in hexadecimal."""
        return hashlib.sha256(self._get_fab(self._run(run_id).fab_hash, run_id).content).hexdigest()

    def send(self, reply: Message) -> None:
        """Send a reply: its envelope, then those of its parts that the link lacks. How long it took is not said."""
        run_id = reply.metadata.run_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            lacking, session = self._send(reply, get_object_tree(reply), 0.0)
            parts = get_all_nested_objects(reply)
            push_objects(parts, partial(self._push_part, run_id, session), object_ids_to_push=lacking)

    def _push_part(self, run_id: int, session: str, object_id: str, content: bytes) -> None:
        """Push a part. Where the answer is lost Flower pushes again, and the link refuses what it has: that is no loss.

        Without this a slow minute costs the site its round: one chunk of many that took longer than 30 s is enough.
        """
        try:
            self._push(run_id, session, object_id, content)
        except ObjectPushError:
            try:
                arrived = self._pull(run_id, object_id) == content
            except (ObjectPullError, ObjectUnavailableError):
                arrived = False
            if not arrived:
                raise

    def _run(self, run_id: int) -> Run:
        if run_id not in self._runs:
            self._runs = {run_id: self._get_run(run_id)}
        return self._runs[run_id]


_Line = tuple[
    int,
    Callable[[], tuple[Message, ObjectTree] | None],
    Callable[[Message, ObjectTree, float], tuple[set[str], str]],
    Callable[[int], Run],
    Callable[[str, int], Fab],
    Callable[[int, str], bytes],
    Callable[[int, str, str, bytes], None],
    Callable[[int, str], None],
]


@contextmanager
def join(address: str, ca_pem: bytes, key: NodeKey) -> Generator[Fleet]:
    """Connect to the link and stay online, by heartbeats of a thread, until the block ends.

    Waits for as long as the link cannot be reached. Flower ends the process within seconds of a refusal, so this is for
    a process of its own.

    Raises:
        FederationError: The link refuses this site, a proxy before it does, or its certificate is not the pinned
            authority's.
        ConfigError: The environment names a proxy that cannot be used.
    """
    try:
        with http_request_response(address, False, ca_pem, (key, key.public_key())) as line:
            TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 0, 0, line[0]
            yield Fleet(line)
    except SystemExit as error:  # Flower's way to say that the link refused
        raise FederationError(explained(address, error.__context__)) from None


def sign_off(address: str, ca_pem: bytes, key: NodeKey, node_id: int) -> bool:
    """Tell the link that this node is gone, for a relay that was killed and could not: else it is refused for a minute.

    Waits for nothing. Returns whether the link had counted the node as online.
    """
    interceptors = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
    try:
        with BoundedClient.from_server_address(address, False, ca_pem, interceptors) as client:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    except (HTTPError, WireError):
        return False
    return True


def refused(address: str, failure: BaseException | None) -> str:
    """Say what a person can do where the link no longer accepts this node's key; empty for any other failure.

    Flower asks its own process to end then (SIGINT), while it handles the answer.
    """
    return explained(address, failure) if answered(failure) == HTTPStatus.UNAUTHORIZED else ""


def refusal(code: int, reason: str, message: Message) -> Message:
    """Make the reply that says no: a code and a fixed word."""
    return Message(Error(code, reason), reply_to=message)


def _object_ids(tree: ObjectTree) -> list[str]:
    ids, waiting = list[str](), [tree]
    while waiting:
        part = waiting.pop()
        ids.append(part.object_id)
        waiting.extend(part.children)
        if len(ids) > MAX_OBJECTS or len(waiting) > MAX_OBJECTS:
            raise WireError(f"Expected a message of at most {MAX_OBJECTS} parts.")
    return ids
