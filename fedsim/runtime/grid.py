"""A Flower `Grid` inside this process."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from threading import Lock
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsim.core.bulk import Broadcast, Replies
from fedsim.core.nodes import client_at, node_of
from fedsim.core.records import FlatRecord, count_bytes
from fedsim.runtime import flower
from fedsim.runtime.request import explain
from fedsim.runtime.work import PARTITION


class LocalGrid(flower.OwnGrid):
    """Runs a `ClientApp` in this process; strategies cannot tell it from Flower's own grids.

    Node ids are partition numbers plus one. A node's `Context.state` is kept between messages.
    Messages are answered one after another, in the order given, when somebody asks for the
    replies: a breakpoint in a client stops there, and a server that sums replies as they come
    holds only one. An exception in a client becomes an error reply that says client, round and
    stage. Thread-safe.

    Args:
        client_app: any Flower ClientApp.
        num_nodes: number of clients.
        run_config: what clients find in `Context.run_config`.
        run_id: what they find as run id.
        debug: let exceptions of clients pass instead of turning them into error replies.
    """

    in_order = True
    """Replies come one for each message, in the order of the messages."""

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        *,
        run_config: Mapping[str, bool | float | int | str] | None = None,
        run_id: int = 1,
        debug: bool = False,
    ) -> None:
        flower.become_server(run_id)
        self._app, self._run_id, self._debug = client_app, run_id, debug
        self.num_nodes = num_nodes
        self._run_config = dict(run_config or {})
        self._contexts: dict[int, Context] = {}  # those used last at the end
        self._touched: set[int] = set()
        self._saved: Mapping[int, RecordDict] = {}
        self._away: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._pending: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        self._lock = Lock()

    def set_run(self, run: flower.Run) -> None:
        """Part of Flower's interface; the run id is fixed at construction."""
        self._run_id = run.run_id

    @property
    def run(self) -> flower.Run:
        """The run, of which only the id is set."""
        return flower.empty_run(self._run_id)

    def get_node_ids(self) -> Iterable[int]:
        """All node ids, ascending."""
        return range(1, self.num_nodes + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; each is executed when its reply is pulled."""
        ids = []
        with self._lock:
            for message in messages:
                number = f"m{next(self._numbers)}"
                flower.set_message_id(message, number)
                self._pending[number] = message
                ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Execute the messages of these ids and return their replies; unknown ids are skipped."""
        return list(self._replies(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies in the order of `messages`, each computed when it is taken.

        A broadcast that nobody has looked into goes to the engine of a `ProgramApp` as a whole.
        `timeout` (seconds) is ignored: nothing can get lost in one process.
        """
        together = self.together(messages) if isinstance(messages, Broadcast) else None
        return self._replies(self.push_messages(messages)) if together is None else together

    def together(self, broadcast: Broadcast) -> Replies | None:
        """The replies in columns, if the ClientApp gives such and the nodes are there."""
        answer, nodes = getattr(self._app, "answer", None), broadcast.nodes
        if answer is None or self._debug or not broadcast.untouched or not nodes:
            return None
        if not 1 <= min(nodes) <= max(nodes) <= self.num_nodes:
            return None
        replies: Replies | None = answer(broadcast, self._context_of)
        return replies

    def _replies(self, message_ids: Iterable[str]) -> Iterator[Message]:
        with self._lock:
            pending = [self._pending.pop(number, None) for number in message_ids]
        messages = [message for message in pending if message is not None]
        together = getattr(self._app, "contents", None)
        if together is None or self._debug or not all(map(self._known, messages)):
            yield from (self._numbered(self.execute(message)) for message in messages)
            return
        answers = together(messages, self._context_of)
        for message, said in zip(messages, answers, strict=True):
            if said is None:
                reply = self.execute(message)
            elif isinstance(said, str):
                reply = self.failure(message, flower.CLIENT_RAISED, said)
            else:
                reply = Message(said, reply_to=message)
            yield self._numbered(reply)

    def _known(self, message: Message) -> bool:
        return 1 <= message.metadata.dst_node_id <= self.num_nodes and message.has_content()

    def _numbered(self, reply: Message) -> Message:
        flower.set_message_id(reply, f"r{next(self._numbers)}")
        return reply

    def context(self, node: int, change: bool = True) -> Context:
        """The node's context; made when first asked for.

        Args:
            node: whose.
            change: whether its state may be changed. If not, a state that is not in memory is
                read, but not kept there.
        """
        with self._lock:
            found = self._contexts.pop(node, None)
            if found is None:
                found = self._make(node)
                if not change:
                    return found
                self._away.discard(node)
            self._contexts[node] = found
            if change:
                self._touched.add(node)
            return found

    def _context_of(self, client: int, change: bool = False) -> Context:
        return self.context(node_of(client), change)

    def _make(self, node: int) -> Context:
        config: dict[str, str | int | float | bool] = {
            PARTITION: client_at(node),
            "num-partitions": self.num_nodes,
        }
        state = self._saved[node] if node in self._away else RecordDict()
        return Context(self._run_id, node, config, state, self._run_config)

    @property
    def unsaved(self) -> int:
        """Bytes of the states that may have changed since `changed_states` was last asked for."""
        with self._lock:
            return sum(count_bytes(self._contexts[n].state) for n in self._touched)

    def changed_states(self) -> dict[int, RecordDict]:
        """State of every node that was at work since this was last asked and has any state."""
        with self._lock:
            nodes, self._touched = sorted(self._touched), set()
            states = {n: self._contexts[n].state for n in nodes}
            for node, state in states.items():
                if len(state):
                    self._sizes[node] = count_bytes(state)
                else:  # memory is for those who have something to remember
                    del self._contexts[node]
        return {n: state for n, state in states.items() if len(state)}

    def spill(self, saved: Mapping[int, RecordDict], budget: int) -> None:
        """Keep in memory `budget` bytes of states, those used last; the others are read again.

        Args:
            saved: gives a node's state; it holds all that `changed_states` has given.
            budget: bytes.
        """
        with self._lock:
            self._saved = saved
            total = sum(self._sizes.values())
            for node in list(self._contexts) if total > budget else ():
                if total <= budget:
                    break
                if node not in self._touched:
                    del self._contexts[node]
                    self._away.add(node)
                    total -= self._sizes.pop(node)

    def load_states(self, states: Mapping[int, RecordDict]) -> None:
        """Replace the state of all nodes; each is taken when it is needed."""
        with self._lock:
            self._contexts.clear()
            self._touched.clear()
            self._sizes.clear()
            self._saved, self._away = states, set(states)

    def execute(self, message: Message) -> Message:
        """Run the ClientApp on one message and return its reply."""
        node = message.metadata.dst_node_id
        if not 1 <= node <= self.num_nodes:
            return self.failure(message, flower.NODE_UNAVAILABLE, f"there is no node {node}")
        own = copy.copy(message)
        own.content = private(message.content)
        try:
            return self._app(own, self.context(node))
        except Exception as error:
            if self._debug:
                raise
            return self.failure(message, flower.CLIENT_RAISED, describe(message, error))

    @staticmethod
    def failure(message: Message, code: int, reason: str) -> Message:
        """An error reply."""
        return Message(Error(code, reason), reply_to=message)


def private(content: RecordDict) -> RecordDict:
    """A copy for one node: arrays are shared, the records around them are not.

    Strategies put one content into all messages, and clients may change what they are sent.
    """
    copies = RecordDict()
    for name, record in content.items():
        if isinstance(record, FlatRecord):  # read-only
            copies[name] = record
            continue
        own: Any = type(record)()
        for key, value in record.items():
            own[key] = list(value) if isinstance(value, list) else value
        copies[name] = own
    return copies


class View(flower.OwnGrid):
    """A grid that shows only some of the nodes of another."""

    def __init__(self, inner: Grid, nodes: list[int]) -> None:
        self._inner, self._nodes = inner, nodes

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._inner.set_run(run)

    @property
    def run(self) -> Any:
        """The inner grid's run."""
        return self._inner.run

    def get_node_ids(self) -> Iterable[int]:
        """The nodes shown."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass on."""
        return self._inner.send_and_receive(messages, timeout=timeout)


def describe(message: Message, error: BaseException, client: int | None = None) -> str:
    """One line on a client's exception: client, round, stage, error, and where it was raised."""
    client = client_at(message.metadata.dst_node_id) if client is None else client
    content = message.content if message.has_content() else RecordDict()
    return explain(client, content, message.metadata.message_type, error)
