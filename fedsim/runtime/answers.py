"""The replies of a whole cohort, computed when they are taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedsim.core.bulk import EXAMPLES, Block, Replies
from fedsim.core.errors import FedsimError
from fedsim.core.nodes import client_at
from fedsim.core.parts import shapes_of
from fedsim.core.records import FlatRecord
from fedsim.runtime import flower
from fedsim.runtime.cohort import Outcomes
from fedsim.runtime.engine import Engine, Judged
from fedsim.runtime.request import ContextOf, Request
from fedsim.runtime.work import Environment

T = TypeVar("T")
Key = tuple[str, tuple[tuple[str, str], ...], tuple[str, ...]]
_NUMBERS = itertools.count(1)


class CohortReplies(Replies):
    """Replies in columns. They come once: whoever takes them has the work done.

    Args:
        request: what is asked.
        nodes: of whom, ascending.
        engine: does the work.
        message_to: makes the message to a node again, for whoever wants replies as messages.
    """

    def __init__(
        self,
        request: Request,
        nodes: Sequence[int],
        engine: Engine,
        message_to: Callable[[int], Message] | None = None,
    ) -> None:
        self._request, self._engine, self._message_to = request, engine, message_to
        self.nodes = nodes
        self._clients = np.array([client_at(n) for n in nodes], np.int64)

    def map(self, then: Callable[[Block], T], keep: bool = False) -> Iterator[T]:
        """See `Replies`."""
        request = self._request
        try:
            work = request.work(self._clients)
        except FedsimError as error:  # every client would say so
            faults = request.faults({int(c): error for c in self._clients})
            yield then(Block(self._clients[:0], {}, {}, {}, (), faults))
            return
        if request.kind == "evaluate":
            for judged in self._engine.measure(work, request.env.batch_size):
                yield then(self._judged(judged))
            return

        def finish(outcomes: Outcomes) -> T:
            return then(request.finish(outcomes, lasting=keep))

        yield from self._engine.map(work, finish, keep)

    def _judged(self, judged: Judged) -> Block:
        return Block(
            judged.clients + 1,
            {},
            {},
            {EXAMPLES: judged.examples, "loss": judged.loss, "accuracy": judged.accuracy},
            (),
            self._request.faults(judged.faults),
        )

    def reply(self, node: int, said: RecordDict | str) -> Message:
        """See `Replies`."""
        assert self._message_to is not None, "made without messages"
        asked = self._message_to(node)
        flower.set_message_id(asked, f"b{next(_NUMBERS)}")
        content = Error(flower.CLIENT_RAISED, said) if isinstance(said, str) else said
        answer = Message(content, reply_to=asked)
        flower.set_message_id(answer, f"a{next(_NUMBERS)}")
        return answer


def contents(
    messages: Sequence[Message], context_of: ContextOf, env: Environment, engine: Engine
) -> Iterator[RecordDict | str | None]:
    """What the client of each message says, or what went wrong, in the order of the messages.

    Messages that differ in their arrays alone, whose clients ascend, are one cohort. None stands
    for a message that does not belong to one.

    Args:
        messages: train or evaluate messages of client halves of the environment.
        context_of: gives the clients' contexts.
        env: data, model and client halves.
        engine: does the work.
    """
    cohorts: dict[Key | None, dict[int, RecordDict]] = {}
    keys = []
    for message in messages:
        key, node = _cohort_of(message, env), message.metadata.dst_node_id
        mine = cohorts.setdefault(key, {})
        if key is not None and mine and node <= next(reversed(mine)):
            key = None
        if key is not None:
            mine[node] = message.content
        keys.append(key)
    streams = {}
    for key, mine in cohorts.items():
        if key is not None and len(mine) > 1:
            own = {client_at(node): content for node, content in mine.items()}
            first = next(iter(mine.values()))
            request = Request(first, str(key[0]), context_of, env, own)
            streams[key] = CohortReplies(request, list(mine), engine).each()
    for key in keys:
        yield next(streams[key])[1] if key in streams else None


def _cohort_of(message: Message, env: Environment) -> Key | None:
    """What messages of one cohort have in common; None if the engine has no part in it."""
    kind, _, action = message.metadata.message_type.partition(".")
    half = env.programs.get(action)
    if kind not in ("train", "evaluate") or half is None or half.resident or half.agent:
        return None
    content = message.content
    if "arrays" not in content.array_records:
        return None
    config = content.config_records.get("config", ConfigRecord())
    told = tuple((name, repr(value)) for name, value in sorted(config.items()))
    arrays = content.array_records["arrays"]
    layout = str(id(arrays.layout)) if isinstance(arrays, FlatRecord) else str(shapes_of(arrays))
    return message.metadata.message_type, told, (layout, *sorted(content.array_records))
