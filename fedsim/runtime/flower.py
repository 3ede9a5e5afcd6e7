"""The few private parts of Flower that an own `Grid` needs, all in this file.

`tests/runtime/test_flower_private.py` names what broke when a new Flower moves one of them.
"""

from __future__ import annotations

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

CLIENT_RAISED = 2
"""Flower's error code for a ClientApp that raised an exception."""
NODE_UNAVAILABLE = 5
"""Flower's error code for a node that cannot be reached."""


class OwnGrid(Grid):
    """Base of our grids: what Flower's interface still asks for, and nobody should call."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Deprecated by Flower: use ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


def become_server(run_id: int = 1) -> None:
    """Let this process build messages: `Message(...)` refuses to without a task identity."""
    if TaskIdentity._run_id is None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, 1


def set_message_id(message: Message, value: str) -> None:
    """Give a message its id, which replies refer to; there is no public setter."""
    message.metadata.__dict__["_message_id"] = value


def set_source(message: Message, node: int) -> None:
    """Say which node a message came from; there is no public setter."""
    message.metadata.__dict__["_src_node_id"] = node


def empty_run(run_id: int) -> Run:
    """The run object that `Grid.run` returns."""
    return Run.create_empty(run_id)


__all__ = [
    "CLIENT_RAISED",
    "NODE_UNAVAILABLE",
    "OwnGrid",
    "Run",
    "become_server",
    "empty_run",
    "set_message_id",
    "set_source",
]
