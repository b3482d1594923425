"""A Grid in this process: no Ray, no network, one message at a time, constant memory in the number of sites.

Flower's Messages, ServerApp and ClientApp are the real ones. A message is delivered when its reply is pulled, so that
one site's work is in memory at a time and the order is always the same.
"""

import itertools
from collections.abc import Iterable
from typing import Any, final

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE_ID = 1000


@final
class LocalGrid(Grid):
    """Nodes 1000, 1001, … that each run the ClientApp in this process."""

    def __init__(self, client_app: ClientApp, number_of_nodes: int) -> None:
        """Make a grid of `number_of_nodes` nodes; node 1000 + i is partition i."""
        self._client_app = client_app
        self._run = Run.create_empty(run_id=1)
        self._node_ids = range(FIRST_NODE_ID, FIRST_NODE_ID + number_of_nodes)
        self._numbers = itertools.count(1)
        self._pending: dict[str, Message] = {}
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Return the run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are pulled."""
        ids: list[str] = []
        for message in messages:
            message_id = f"local-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = message_id
            self._pending[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Deliver the first of these messages that is still pending, and return its reply."""
        for message_id in message_ids:
            message = self._pending.pop(message_id, None)
            if message is not None:
                return [self._deliver(message)]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver messages and return their replies; nothing here takes time that could run out."""
        del timeout
        ids = list(self.push_messages(messages))
        return [reply for message_id in ids for reply in self.pull_messages([message_id])]

    def _deliver(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        if node_id not in self._node_ids:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "no such node"), reply_to=message)
        node_config: dict[str, Any] = {
            "partition-id": node_id - FIRST_NODE_ID,
            "num-partitions": len(self._node_ids),
        }
        context = Context(run_id=1, node_id=node_id, node_config=node_config, state=RecordDict(), run_config={})
        return self._client_app(message, context)
