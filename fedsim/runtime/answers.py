"""The replies of a whole cohort to a broadcast, computed when they are taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from flwr.app import Error, Message, RecordDict

from fedsim.core.bulk import EXAMPLES, Block, Broadcast, Replies
from fedsim.core.errors import FedsimError
from fedsim.core.nodes import client_at
from fedsim.runtime import flower
from fedsim.runtime.cohort import Outcomes
from fedsim.runtime.engine import Engine, Judged
from fedsim.runtime.request import Request

T = TypeVar("T")
_NUMBERS = itertools.count(1)


class CohortReplies(Replies):
    """Replies in columns. They come once: whoever takes them has the work done.

    Args:
        broadcast: what is asked, and of whom.
        request: the same for the engine.
        engine: does the work.
    """

    def __init__(self, broadcast: Broadcast, request: Request, engine: Engine) -> None:
        self._broadcast, self._request, self._engine = broadcast, request, engine
        self.nodes = broadcast.nodes
        self._clients = np.array([client_at(n) for n in broadcast.nodes], np.int64)

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
        asked = self._broadcast.message_to(node)
        flower.set_message_id(asked, f"b{next(_NUMBERS)}")
        content = Error(flower.CLIENT_RAISED, said) if isinstance(said, str) else said
        answer = Message(content, reply_to=asked)
        flower.set_message_id(answer, f"a{next(_NUMBERS)}")
        return answer
