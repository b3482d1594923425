"""The relay: takes each message from the link, lets the installed ClientApp ask the agent, and sends the answer back.

It sees no patient and holds no key but the one by which Flower's link knows the node. It runs `client.app` as it is
installed here and never looks into the coordinator's bundle; with a list of bundles (bundles.txt) it serves only their
runs. Outwards go replies and codes, never a text; reasons stand in the relay's own log. Imports no torch and no
pydicom. Out of scope: the protocol (client/fleet), keeping it running (client/supervise).
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import final

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client import fleet
from client.app import app as installed_app
from client.fleet import Fleet, RunEnded, refusal
from client.joining import load_pinned, read_node_key
from client.paths import Home
from client.relay_state import STOPPED, State, node_before
from client.trust import read_bundles, trusted
from common.errors import FederationError, RefusalCode, WireError
from common.files import make_folder
from common.wire import MESSAGE_TYPES

LOG = logging.getLogger("fedmedgan.relay")

POLL_S = 0.2
"""Between two questions for a message while a run is under way."""
IDLE_POLL_S = 1.0
"""The same when none came for `IDLE_AFTER_S`."""
IDLE_AFTER_S = 120.0
SIGNED_OFF_S = 4.0
"""How long a killed relay's node stays signed off: until the ServerApp has asked once and heard that the node is gone,
with whatever message it had taken. Otherwise it would wait for the answer until its deadline."""
FAILURE_WAIT_S = 5.0
MAX_FAILURES = 10
"""Failures in a row after which the relay ends, for its supervisor to start it anew."""
FIRST_AGENT_POLL_S, AGENT_POLL_S = 0.1, 1.0
"""Between two attempts to reach the agent: an agent that has just started is there at once."""
MAX_WAIT_FOR_AGENT_S = 300.0
"""For an agent that starts or is started anew."""
_KNOWN_TYPES = frozenset(MESSAGE_TYPES.values())


class _Stopped(BaseException):
    """A signal asked the relay to end; passes through every handler of ordinary errors."""


@final
@dataclass
class _Ending:
    """Why this process ends, if for another reason than that it was asked to."""

    failure: BaseException | None = None

    def of_a_thread(self, failed: threading.ExceptHookArgs) -> None:
        """End when the thread of heartbeats does: without them the link forgets this node, and nobody would notice."""
        self.failure = failed.exc_value
        LOG.error("a thread failed: %s", failed.exc_value)
        os.kill(os.getpid(), signal.SIGINT)

    def explain(self, address: str, stopped: BaseException) -> str:
        """Return what went wrong; empty where a signal of somebody else's ends the relay.

        Flower's own signal comes while it handles the link's refusal, in this thread or in that of the heartbeats.
        """
        if said := fleet.refused(address, stopped.__context__) or fleet.refused(address, self.failure):
            return said
        return f"The line to {address} failed: {self.failure}. It may be started anew." if self.failure else ""


def run(home: Home, socket: Path, state: State) -> None:
    """Relay between the pinned coordinator and the agent behind `socket` until SIGTERM or Ctrl-C.

    The caller holds the home's relay lock: a relay that starts signs its predecessor off at the link.

    Args:
        home: Holds keys/node.key and federation.json, unless they are handed over as credentials, and, if wanted,
            bundles.txt and site.toml, of which only `extra_ca` is looked at; nothing else of it is read.
        socket: The agent's Unix socket. The agent may come and go.
        state: What this relay says of itself; it has a node from the moment that the link lets it in.

    Raises:
        ConfigError: The site has not joined, or the list of bundles or the extra CA does not read.
        StorageError: The node key cannot be read.
        FederationError: The link refuses this site, or no longer accepts it, or failed too often.

    Guarantees:
        - no_silent_end: A relay that the link puts out, in the middle of a run too, ends with an error that says so.
    """
    pinned, key, bundles = load_pinned(home.folder), read_node_key(home.folder), read_bundles(home.bundles)
    make_folder(state.path.parent, 0o700)
    ending = _Ending()
    threading.excepthook = ending.of_a_thread
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    ca_pem = trusted(home, pinned.ca_pem)
    address = f"[{pinned.host}]:{pinned.port}" if ":" in pinned.host else f"{pinned.host}:{pinned.port}"
    LOG.info("connecting to %s at %s as %s", pinned.federation, address, pinned.site)
    try:
        before = node_before(state.path)
        if before and fleet.sign_off(address, ca_pem, key, before):
            LOG.info("signed the killed relay off")
            time.sleep(SIGNED_OFF_S)
        with fleet.join(address, ca_pem, key) as line:
            LOG.info("connected; node %d", line.node_id)
            state.node_id = line.node_id
            relay(line, installed_app, socket, bundles, state)
    except _Stopped as stopped:
        if why := ending.explain(address, stopped):
            state.end(why)
            raise FederationError(why) from None
        state.end(STOPPED)
        LOG.info("stopped")
    except FederationError as error:
        state.end(str(error))
        raise


def relay(line: Fleet, app: ClientApp, socket: Path, bundles: AbstractSet[str] | None, state: State) -> None:
    """Serve messages, one at a time, until a signal or too many failures in a row.

    Guarantees:
        - only_codes_leave: Whatever goes wrong while a message is served, its reply is a code and a fixed word.
        - only_known_requests: Agent tasks and unknown message types are refused before their content is fetched.
        - only_listed_bundles: Where the site keeps a list, a run with another bundle is refused; nothing is opened.

    Raises:
        FederationError: `MAX_FAILURES` failures in a row.
    """
    failures, last = 0, time.monotonic()
    while failures < MAX_FAILURES:
        try:
            served = _serve_one(line, app, socket, bundles)
            state.note(message=served)
            failures, last = 0, time.monotonic() if served else last
            if not served:
                time.sleep(POLL_S if time.monotonic() - last < IDLE_AFTER_S else IDLE_POLL_S)
        except RunEnded:
            LOG.info("the run has ended; its message is left")
        except Exception:  # the process edge: one bad message or answer of the link ends no relay
            failures += 1
            LOG.exception("failure %d of %d in a row", failures, MAX_FAILURES)
            time.sleep(FAILURE_WAIT_S)
    raise FederationError(
        f"The link failed {MAX_FAILURES} times in a row; the relay's log says how. It may be started anew."
    )


def _serve_one(line: Fleet, app: ClientApp, socket: Path, bundles: AbstractSet[str] | None) -> bool:
    received = line.receive()
    if received is None:
        return False
    envelope, tree = received
    about, started = envelope.metadata, time.monotonic()
    name = about.message_type if about.message_type in _KNOWN_TYPES else "an unknown type"
    LOG.info("run %d round %.16s: %s received", about.run_id, ascii(about.group_id), name)
    refused = _refused(line, envelope, bundles)
    if refused is not None:
        line.send(refused)  # not confirmed: its parts may still be on their way to the link
        return True
    try:
        message = line.content(envelope, tree)
    except WireError as error:
        LOG.warning("refused: %s", error)
        line.send(refusal(fleet.FAILED, "bad-request", envelope))
        return True
    reply = _answer(app, message, socket, line.node_id)
    answered = time.monotonic()
    line.send(reply)
    LOG.info("answered after %.2f s, sent in %.2f s", answered - started, time.monotonic() - answered)
    return True


def _refused(line: Fleet, envelope: Message, bundles: AbstractSet[str] | None) -> Message | None:
    run_id = envelope.metadata.run_id
    if envelope.metadata.message_type not in _KNOWN_TYPES:
        LOG.warning("refused: a message of an unknown type")
        return refusal(fleet.UNKNOWN_REQUEST, "unknown-request", envelope)
    if line.is_agent_task(run_id):
        LOG.warning("refused: a task for a language model")
        return refusal(fleet.UNKNOWN_REQUEST, "unknown-task", envelope)
    if bundles is not None and (found := line.bundle(run_id)) not in bundles:
        LOG.warning("refused: the bundle %s is not in bundles.txt", found)
        return refusal(fleet.INVALID_BUNDLE, "bundle-not-listed", envelope)
    return None


def _answer(app: ClientApp, message: Message, socket: Path, node_id: int) -> Message:
    """Ask the installed ClientApp; while the agent is away, again and again for as long as the message lives.

    An agent that was killed over a request and is back answers it as it would have, for the same charge.
    """
    run_id, where = message.metadata.run_id, str(socket)
    context = Context(
        run_id=run_id, node_id=node_id, node_config={"agent-socket": where}, state=RecordDict(), run_config={}
    )
    deadline = time.monotonic() + min(message.metadata.ttl, MAX_WAIT_FOR_AGENT_S)
    try:
        wait_s = FIRST_AGENT_POLL_S
        while _is_unreachable(reply := app(message, context)) and time.monotonic() + wait_s < deadline:
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, AGENT_POLL_S)
    except Exception:  # the process edge: the text of an exception stays here
        LOG.exception("a message failed")
        return refusal(fleet.FAILED, "internal-error", message)
    return reply


def _is_unreachable(reply: Message) -> bool:
    header = reply.content.config_records.get("header")
    return header is not None and header.get("refusal") == RefusalCode.UNREACHABLE


def _stop(number: int, frame: FrameType | None) -> None:
    del number, frame
    for later in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # Flower sends more than one, and the goodbye to the link takes a while
        signal.signal(later, signal.SIG_IGN)
    raise _Stopped
