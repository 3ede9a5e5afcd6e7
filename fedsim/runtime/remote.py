"""A Flower grid of other processes (Ray simulation, SuperLink), made to look like a local one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsim.core.errors import RunError
from fedsim.core.nodes import client_at, node_of
from fedsim.core.records import plain
from fedsim.runtime import flower
from fedsim.runtime.envelope import ENROL, ENVELOPE, Enrolment, Envelope
from fedsim.runtime.grid import LocalGrid
from fedsim.runtime.roll import Roll
from fedsim.runtime.traffic import Copies, Sent, Traffic, remember

LOOK = 2.0
"""Seconds between looks at which nodes are there."""


class RemoteGrid(flower.OwnGrid):
    """Any Flower grid, with clients named by their partition number.

    Flower's node ids are random, differ from run to run, and are wrong in the replies that it makes
    up for dead nodes. Here a node id is a partition number plus one, in both directions; replies
    are told apart by the message they answer and by nothing else. Replies come in the order of
    their arrival.

    Args:
        inner: Flower's grid.
        num_clients: clients 0 to num_clients - 1 are expected.
        run: name of the run, the same after a resume.
        digest: names the code of the server; a node with other code is refused.
        poll: seconds between looks for replies.
        grace: seconds within which a node that went away may come back: its message is sent once
            more, and the error reply to the first is forgotten. 0: it counts at once.
        stopped: asked while waiting; if it is true, the run is interrupted.
        roll: file of what nodes have said of themselves; None: all are asked.
        patience: seconds to wait before a round for enough nodes to be connected.
    """

    in_order = False

    def __init__(
        self,
        inner: Grid,
        num_clients: int,
        *,
        run: str = "0",
        digest: str = "",
        poll: float = 0.1,
        grace: float = 0.0,
        stopped: Callable[[], bool] = lambda: False,
        roll: Path | None = None,
        patience: float = 60.0,
    ) -> None:
        self._inner, self.num_nodes, self._run, self._digest = inner, num_clients, run, digest
        self._poll, self._grace, self._stopped = poll, grace, stopped
        self.declared: dict[int, tuple[int, int]] = {}
        self.floor = 0
        self._place: dict[int, int] = {}
        self._asked: dict[int, str] = {}
        self._late: dict[str, Sent] = {}
        self._answered: dict[str, Sent] = {}
        self._count, self._round, self._phase = 0, -1, 0
        self._since: dict[int, str] = {}
        self._looked = 0.0
        self._roll, self._patience = Roll(roll), patience
        self._missed: set[int] = set()

    # -- who is there ------------------------------------------------------------------------

    def enrol(self, timeout: float) -> None:
        """Ask nodes that are new for their clients; waits for the answers.

        Args:
            timeout: seconds to wait for answers.

        Raises:
            RunError: a node runs other code than the server.
        """
        new = [n for n in self._inner.get_node_ids() if n not in self._asked]
        if new and self._grace:
            self._look()
            new = [n for n in new if not self._remembered(n)]
        queries = [Message(RecordDict(), dst_node_id=n, message_type=f"query.{ENROL}") for n in new]
        if not queries:
            return
        nodes = dict(zip(self._push(queries), new, strict=True))
        nodes.pop("", None)
        self._asked.update(dict.fromkeys(new, "no answer yet"))
        deadline = time.monotonic() + timeout
        while nodes and time.monotonic() < deadline:
            for reply in self._inner.pull_messages(list(nodes)):
                node = nodes.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    self._admit(node, reply)
            self._rest()
        for node in nodes.values():  # silent: ask again next time
            del self._asked[node]
        self._roll.save()

    def _remembered(self, node: int) -> bool:
        """Whether a node has said before, while it was online without a break, what it serves."""
        found = self._roll.known(node, self._since.get(node, ""), self._digest)
        if found is not None:
            self._enter(node, found)
        return found is not None

    def _admit(self, node: int, reply: Message) -> None:
        if reply.has_error():
            del self._asked[node]
            self._fault = reply.error.reason or ""
            return
        try:
            found = Enrolment.of(reply.content)
        except ValueError as error:
            self._asked[node] = self._fault = str(error)
            return
        if self._digest and found.digest != self._digest:
            raise RunError(
                f"a node runs other code than the server ({found.digest} instead of "
                f"{self._digest}): start both from the same checkout"
            )
        self._roll.note(node, self._since.get(node, ""), found)
        self._enter(node, found)

    def _enter(self, node: int, found: Enrolment) -> None:
        self._asked[node] = "serves"
        for client, train, test in zip(found.clients, found.train, found.test, strict=True):
            if client < self.num_nodes:
                self._place[client] = node
                self.declared[client] = (train, test)

    _fault = ""

    def wait(self, timeout: float) -> None:
        """Wait until every client has a node.

        Args:
            timeout: seconds.

        Raises:
            RunError: some client has none by then.
        """
        deadline = time.monotonic() + timeout
        while len(self._place) < self.num_nodes:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [str(c) for c in range(self.num_nodes) if c not in self._place]
                raise RunError(
                    f"no node serves client {', '.join(missing[:5])}"
                    f"{' and others' if len(missing) > 5 else ''} after {timeout:g} s "
                    f"({len(self._place)} of {self.num_nodes} clients are there"
                    f"{'; a node says: ' + self._fault if self._fault else ''}); start "
                    "their SuperNodes, or wait longer with node-timeout"
                )
            self.enrol(left)
            self._rest()

    def get_node_ids(self) -> Iterable[int]:
        """The clients whose node is connected now, ascending; new nodes are asked first."""
        self.enrol(timeout=30.0)
        there = set(self._inner.get_node_ids())
        return [node_of(c) for c, node in sorted(self._place.items()) if node in there]

    def gather(self, clients: Iterable[int], least: int) -> None:
        """Before a round: wait for nodes that went away and may come back.

        For a node at most `grace` seconds, and only once until it has answered again; for enough
        nodes at most `patience` seconds. Whoever is not there then is not asked.

        Args:
            clients: node ids, as of `get_node_ids`.
            least: how many are enough.
        """
        wanted, start = set(clients), time.monotonic()
        while self._grace:
            there, waited = set(self.get_node_ids()) & wanted, time.monotonic() - start
            hoped = waited < self._grace and wanted - there - self._missed
            needed = waited < self._patience and len(there) < least
            if not hoped and not needed:
                self._missed |= wanted - there
                return
            self._rest(0.5)

    # -- messages ----------------------------------------------------------------------------

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send now; replies as they come, until all are there or `timeout` (seconds) is over.

        A reply that comes after its cut-off is handed out with those of a later exchange.
        """
        traffic = Traffic()
        for message in messages:
            self._count += 1
            flower.set_message_id(message, f"m{self._count}")
            node = self._place.get(client_at(message.metadata.dst_node_id))
            if node is None:
                traffic.ready.append(self._gone(message, "no node serves this client"))
            else:
                traffic.queues.setdefault(node, deque()).append(message)
        self._number(traffic)
        self._look()
        self._feed(traffic, list(traffic.queues))
        return self._arrivals(traffic, timeout)

    def _number(self, traffic: Traffic) -> None:
        """Count the exchanges of a round: the same numbers come again when it is repeated."""
        for queue in traffic.queues.values():
            config = queue[0].content.config_records.get("config", ConfigRecord())
            number = int(cast(int, config.get("server-round", 0)))
            self._phase = self._phase + 1 if number == self._round else 0
            self._round = number
            return

    def _arrivals(self, traffic: Traffic, timeout: float | None) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                while traffic.ready:
                    yield traffic.ready.popleft()
                if not (traffic.open or traffic.lost):
                    return
                if deadline is not None and time.monotonic() >= deadline:
                    return
                self._pull(traffic)
                if self._grace and time.monotonic() > self._looked + LOOK:
                    self._recover(traffic)
        finally:  # whoever stops taking replies leaves the rest to come late
            awaited = [*traffic.open.values(), *(sent for sent, _, _ in traffic.lost.values())]
            self._missed |= {sent.message.metadata.dst_node_id for sent in awaited}
            for number, sent in traffic.open.items():
                remember(self._late, number, sent)

    def _pull(self, traffic: Traffic) -> None:
        replies = list(self._inner.pull_messages([*traffic.open, *self._late]))
        free = []
        for reply in replies:
            number = reply.metadata.reply_to_message_id
            sent = traffic.open.get(number)
            if sent is not None and self._foreign(sent, reply):
                traffic.ready.append(self._presented(sent, reply))
                continue
            if sent is not None:
                del traffic.open[number]
                if self._grace and not sent.again and _is_gone(reply):
                    traffic.lost[number] = sent, reply, time.monotonic() + self._grace
                    continue
                free.append(sent.node)
                self._missed.discard(sent.message.metadata.dst_node_id)
            else:
                sent = self._late.pop(number, None) or self._answered.get(number)
            if sent is not None:
                remember(self._answered, number, sent)
                traffic.ready.append(self._presented(sent, reply))
        self._feed(traffic, free)
        if not replies:
            self._rest()

    def _feed(self, traffic: Traffic, nodes: list[int]) -> None:
        """Give each of these nodes its next message."""
        batch = [(n, traffic.queues[n].popleft()) for n in nodes if traffic.queues.get(n)]
        refused = self._send(traffic, [Sent(m, n, self._since.get(n, "")) for n, m in batch])
        if refused:
            self._feed(traffic, refused)

    def _send(self, traffic: Traffic, batch: list[Sent]) -> list[int]:
        """Send; the nodes whose message Flower did not take."""
        numbers = self._push([self._wrapped(s.message, s.node, traffic.copies) for s in batch])
        refused = []
        for number, sent in zip(numbers, batch, strict=True):
            if number:
                traffic.open[number] = sent
            else:
                traffic.ready.append(self._gone(sent.message, "its node is not connected"))
                refused.append(sent.node)
        return refused

    def _look(self) -> None:
        """Find out since when each node is online."""
        if self._grace:
            self._since = {n.node_id: n.last_activated_at for n in self._inner.get_nodes()}
            self._looked = time.monotonic()

    def _recover(self, traffic: Traffic) -> None:
        """Send messages again to nodes that went away with them and came back."""
        self._look()
        batch, free = [], []
        for number, sent in list(traffic.open.items()):
            if self._since.get(sent.node, sent.since) != sent.since and not sent.again:
                remember(self._late, number, traffic.open.pop(number))
                batch.append(sent)
        for number, (sent, reply, until) in list(traffic.lost.items()):
            if sent.node in self._since or time.monotonic() > until:
                del traffic.lost[number]
                if sent.node in self._since:
                    batch.append(sent)
                else:
                    free.append(sent.node)
                    self._missed.add(sent.message.metadata.dst_node_id)
                    traffic.ready.append(self._presented(sent, reply))
        self._send(traffic, [Sent(s.message, s.node, self._since[s.node], True) for s in batch])
        self._feed(traffic, free)

    def _push(self, messages: list[Message]) -> list[str]:
        """Flower's ids of these messages, "" where it refused one."""
        taken = set(self._inner.push_messages(messages)) if messages else set()
        numbers = [m.metadata.message_id for m in messages]
        return [n if n in taken else "" for n in numbers]

    def _wrapped(self, message: Message, node: int, copies: Copies) -> Message:
        """The message for Flower: plain arrays, each record copied once, and the envelope."""
        content = RecordDict()
        for name, record in message.content.items():
            if isinstance(record, ArrayRecord):
                _, record = copies.setdefault(id(record), (record, plain(record)))
            content[name] = record
        client = client_at(message.metadata.dst_node_id)
        content[ENVELOPE] = Envelope(client, self._run, self._phase, self.floor).record()
        return Message(
            content, node, message.metadata.message_type, group_id=str(max(self._round, 0))
        )

    def _presented(self, sent: Sent, reply: Message) -> Message:
        """The reply as from the client that was asked; its own metadata are not believed."""
        if reply.has_error():
            # Flower names itself as the source of the errors that it makes up.
            return Message(reply.error, reply_to=sent.message)
        shown = Message(reply.content, reply_to=sent.message)
        if self._foreign(sent, reply):
            flower.set_source(shown, 0)
        return shown

    @staticmethod
    def _foreign(sent: Sent, reply: Message) -> bool:
        """Whether another node than the one that was asked has answered."""
        return not reply.has_error() and reply.metadata.src_node_id != sent.node

    @staticmethod
    def _gone(message: Message, reason: str) -> Message:
        return LocalGrid.failure(message, flower.NODE_UNAVAILABLE, reason)

    def _rest(self, seconds: float = 0.0) -> None:
        if self._stopped():
            raise KeyboardInterrupt
        time.sleep(seconds or self._poll)

    # -- the rest of Flower's interface ------------------------------------------------------

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not offered: replies are matched within `send_and_receive`."""
        raise TypeError("use send_and_receive on this grid")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not offered: replies are matched within `send_and_receive`."""
        raise TypeError("use send_and_receive on this grid")

    def set_run(self, run: flower.Run) -> None:
        """Pass on."""
        self._inner.set_run(run)

    @property
    def run(self) -> flower.Run:
        """The inner grid's run."""
        return self._inner.run

    def changed_states(self) -> dict[int, RecordDict]:
        """Nothing: what clients keep stays where they are (`fedsim.runtime.keeping`)."""
        return {}

    def load_states(self, states: Mapping[int, RecordDict]) -> None:
        """Nothing to do: clients have their own state."""


def _is_gone(reply: Message) -> bool:
    """Whether this is what Flower answers for a node that went away."""
    return reply.has_error() and reply.error.code == flower.NODE_UNAVAILABLE
