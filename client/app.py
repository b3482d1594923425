"""The ClientApp: forwards each message to the site's agent and returns its answer. No torch, no pydicom, no data.

A hospital runs this installed copy, never the one in the coordinator's bundle. Which agent: `agent-socket` in the
node's own configuration; under Flower's simulation runtime, the virtual hospital of this partition (client/virtual).
"""

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import virtual
from client.channel import Transport, connect
from common import wire
from common.errors import RefusalCode, WireError
from common.messages import Kind, Reply

LOG = logging.getLogger("fedmedgan.relay")

Connect = Callable[[Context], Transport]


def make_app(connect_to_agent: Connect) -> ClientApp:
    """Make a ClientApp that forwards to the agent that `connect_to_agent` finds for a context."""
    app = ClientApp()
    for kind, message_type in wire.MESSAGE_TYPES.items():
        category, _, action = message_type.partition(".")
        register = app.query if category == "query" else app.train

        def handle(message: Message, context: Context, kind: Kind = kind) -> Message:
            return wire.encode_reply(_forward(kind, message, context, connect_to_agent), message)

        register(action)(handle)
    return app


def _forward(kind: Kind, message: Message, context: Context, connect_to_agent: Connect) -> Reply:
    """Ask the agent; whatever fails becomes a code, and the text stays here."""
    try:
        request = wire.decode_request(message)
        return connect_to_agent(context)(request)
    except WireError as error:
        LOG.warning("refused a message: %s", error)
        return Reply(kind, "", 0, RefusalCode.BAD_REQUEST)
    except OSError as error:
        LOG.error("the agent does not answer: %s", error)  # expected while the agent restarts
        return Reply(kind, "", 0, RefusalCode.UNREACHABLE)
    except Exception:  # the process edge: Flower would send the text of an exception to the coordinator
        LOG.exception("the agent failed")
        return Reply(kind, "", 0, RefusalCode.INTERNAL)


def find_agent(context: Context) -> Transport:
    """Return the transport to the agent that this node's own configuration names.

    Raises:
        OSError: The node's configuration names no agent.
    """
    socket = context.node_config.get("agent-socket")
    if isinstance(socket, str):
        return connect(Path(socket), timeout_s=24 * 3600.0)
    return virtual.find_agent(context.node_config, context.run_config, context.run_id)


app = make_app(find_agent)
