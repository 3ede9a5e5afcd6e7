"""A Flower grid of nodes in this process: mail is lost, repeated and delayed, in virtual time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from fedsim.core.records import materialise
from fedsim.runtime import flower
from fedsim.runtime.envelope import Envelope

UNAVAILABLE = 5


class Clock:
    """Stands in for the module `time`: sleeping costs nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Seconds since the start."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@dataclass
class Fate:
    """What becomes of one reply.

    Attributes:
        copies: how many arrive; 0: it is lost.
        delay: seconds until it arrives.
        foreign: it claims to come from another node.
        error: Flower answers in the name of a node that died.
        change: changes the reply's content.
    """

    copies: int = 1
    delay: float = 0.0
    foreign: bool = False
    error: bool = False
    change: Callable[[RecordDict], RecordDict] = field(default=lambda content: content)


class Post(flower.OwnGrid):
    """What `InMemoryGrid` and `HttpGrid` are to a ServerApp, with nodes in this process.

    Args:
        app: what the nodes run.
        num_nodes: number of nodes.
        clock: virtual time.
        partitions: value of ``num-partitions``; None: the number of nodes.
        node_config: more of the nodes' configuration.
    """

    def __init__(
        self,
        app: ClientApp,
        num_nodes: int,
        clock: Clock | None = None,
        partitions: int | None = None,
        node_config: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        flower.become_server()
        self.app, self.clock = app, clock or Clock()
        draw = np.random.default_rng(seed)
        numbers = draw.choice(2**62, num_nodes, replace=False).tolist()
        config = {"num-partitions": partitions or num_nodes, **(node_config or {})}
        self.contexts = {
            node: Context(1, node, {**config, "partition-id": p}, RecordDict(), {})
            for p, node in enumerate(numbers)
        }
        self.offline: set[int] = set()
        self.since = dict.fromkeys(numbers, "once")
        self.fate: Callable[[int, Message], Fate] = lambda client, message: Fate()
        self.executed: list[tuple[int, str]] = []
        self._mail: list[tuple[float, Message]] = []
        self._ids = itertools.count(1)
        self._busy: dict[str, int] = {}
        self.most_at_once = 0

    def set_run(self, run: Any) -> None:
        """Nothing to do."""

    @property
    def run(self) -> Any:
        """An empty run."""
        return flower.empty_run(1)

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are connected, in no order."""
        return [n for n in self.contexts if n not in self.offline]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The same, with the time of their coming."""
        return [
            NodeInfo(node_id=n, last_activated_at=self.since[n])
            for n in self.contexts
            if n not in self.offline
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Flower leaves out messages to nodes it does not know."""
        taken = []
        for message in messages:
            number = f"flower-{next(self._ids)}"
            flower.set_message_id(message, number)
            if message.metadata.dst_node_id not in self.contexts:
                continue
            taken.append(number)
            self._serve(message)
        return taken

    def _serve(self, message: Message) -> None:
        node = message.metadata.dst_node_id
        envelope = Envelope.of(message)
        fate = Fate() if envelope is None else self.fate(envelope.client, message)
        if node in self.offline and not fate.error:
            fate = Fate(copies=0)
        self._busy[message.metadata.message_id] = node
        self.most_at_once = max(self.most_at_once, *Counter(self._busy.values()).values())
        if fate.error:
            reply = Message(Error(UNAVAILABLE, "Node Unavailable"), reply_to=message)
            flower.set_source(reply, 1)
        else:
            self.executed.append((node, message.metadata.message_type))
            try:
                reply = self.app(message, self.contexts[node])
            except Exception as error:  # as Flower does
                reply = Message(Error(2, str(error)), reply_to=message)
            if reply.has_content():
                reply.content = fate.change(materialise(reply.content))
        if fate.foreign:
            flower.set_source(reply, node + 1)
        at = self.clock.now + fate.delay
        self._mail += [(at, reply)] * fate.copies

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """What has arrived for these messages."""
        wanted, there, rest = set(message_ids), [], []
        for at, reply in self._mail:
            due = at <= self.clock.now and reply.metadata.reply_to_message_id in wanted
            (there if due else rest).append((at, reply))
        self._mail = rest
        for _, reply in there:
            self._busy.pop(reply.metadata.reply_to_message_id, None)
        return [reply for _, reply in there]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Not used by our grid."""
        raise AssertionError
