"""The messages of one exchange with remote nodes, on their way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message, RecordDict

from fedsim.runtime import flower

KEPT = 1000
"""Messages of earlier exchanges by which late and second replies are recognised."""


class Copies(dict[int, tuple[ArrayRecord, ArrayRecord]]):
    """By identity: a record that many messages share, and its plain copy."""


@dataclass
class Sent:
    """A message under way.

    Attributes:
        message: as the round loop sees it.
        node: Flower's id of the node that has it.
        since: when that node had come online, as Flower says it.
        again: it was sent a second time.
    """

    message: Message
    node: int
    since: str = ""
    again: bool = False


@dataclass
class Traffic:
    """The messages of one exchange.

    Attributes:
        queues: messages that wait for their node, which gets one at a time: two at once on one
            node would overwrite each other's state.
        open: messages under way, by Flower's message id.
        lost: messages whose node went away, with the error reply to that and the time at which it
            counts.
        ready: replies that are there.
        copies: the records they carry.
    """

    queues: dict[int, deque[Message]] = field(default_factory=dict)
    open: dict[str, Sent] = field(default_factory=dict)
    lost: dict[str, tuple[Sent, Message, float]] = field(default_factory=dict)
    ready: deque[Message] = field(default_factory=deque)
    copies: Copies = field(default_factory=Copies)


def remember(where: dict[str, Sent], number: str, sent: Sent) -> None:
    """Keep what is needed to recognise a reply, without the content of its message."""
    old = sent.message
    stub = Message(RecordDict(), old.metadata.dst_node_id, old.metadata.message_type)
    flower.set_message_id(stub, old.metadata.message_id)
    where[number] = Sent(stub, sent.node)
    if len(where) > KEPT:
        del where[next(iter(where))]
