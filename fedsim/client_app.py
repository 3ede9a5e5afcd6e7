"""The Flower ClientApp that serves every client half by its route."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.app_config import STATE, Settings
from fedsim.config import Experiment, StrategyConfig
from fedsim.core.bulk import Broadcast
from fedsim.core.errors import RunError
from fedsim.core.records import materialise
from fedsim.runtime import agent, code, flower, resident
from fedsim.runtime.answers import CohortReplies, contents
from fedsim.runtime.engine import Engine
from fedsim.runtime.envelope import ENROL, Enrolment, Envelope
from fedsim.runtime.grid import describe
from fedsim.runtime.keeping import Keeping
from fedsim.runtime.request import ContextOf, Request
from fedsim.runtime.serial import Serial
from fedsim.runtime.work import PARTITION, Environment, action_of, judged

PARTITIONS = "num-partitions"
"""Key of the number of partitions in Flower's node configuration."""
STATE_FOLDER = "state-dir"
"""Key of the folder for clients' state in the node configuration."""


@lru_cache(maxsize=2)
def _environment(experiment: str, seed: int, entry: str) -> Environment:
    torch.set_num_threads(1)  # as everywhere: a client's arithmetic takes one thread
    chosen = StrategyConfig.model_validate_json(entry)
    return Environment.of(Experiment.model_validate_json(experiment), seed, chosen)


def served(node_config: Mapping[str, Any], num_clients: int) -> range:
    """The clients of a node: p, p + P, ... (see `Enrolment`).

    Raises:
        RunError: the node's configuration lacks its partition.
    """
    if PARTITION not in node_config:
        raise RunError(f"the node's configuration lacks {PARTITION!r}: start it with one")
    first, step = int(node_config[PARTITION]), int(node_config.get(PARTITIONS, 0))
    return range(first, num_clients, step or num_clients)


class ProgramApp(ClientApp):
    """Answers ``train.NAME`` and ``evaluate.NAME`` for every client half of the experiment.

    The experiment comes in the run configuration, so the same app runs in this process, under
    Flower's simulation and on SuperNodes.

    Args:
        environment: use this one instead of what the run configuration says.
        run_config: use this one instead of the context's.
        engine: answers broadcasts, with the given environment.
    """

    def __init__(
        self,
        environment: Environment | None = None,
        run_config: Mapping[str, bool | float | int | str] | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__()
        self._given, self._run_config = environment, dict(run_config or {})
        self.engine = engine

    def __reduce__(self) -> tuple[Any, ...]:
        return ProgramApp, (None, self._run_config)

    def environment(self, context: Context) -> Environment:
        """The environment of the context's run, loaded once per process.

        Raises:
            FedsimError: the run configuration names no usable experiment.
        """
        if self._given is not None:
            return self._given
        settings = Settings.of(self._run_config or context.run_config)
        experiment, entry = (s.model_dump_json() for s in (settings.experiment, settings.entry))
        return _environment(experiment, settings.seed, entry)

    def __call__(self, message: Message, context: Context) -> Message:
        """Do the work of one message."""
        kind, action = action_of(message)
        if kind == "query" and action == ENROL:
            return self._enrol(message, context)
        envelope = Envelope.of(message)
        if envelope is None:
            return self._answer(message, context)
        try:
            return self._deliver(message, context, envelope)
        except Exception as error:
            return Message(
                Error(flower.CLIENT_RAISED, describe(message, error, envelope.client)),
                reply_to=message,
            )

    def _answer(self, message: Message, context: Context) -> Message:
        kind, action = action_of(message)
        env = self.environment(context)
        if action not in env.programs or kind not in ("train", "evaluate"):
            return super().__call__(message, context)
        half = env.programs[action]
        if half.resident or half.agent:
            content = (agent if half.agent else resident).answer(message, context, env)
            return Message(content if self._given else materialise(content), reply_to=message)
        said = Request(message.content, message.metadata.message_type, lambda *_: context, env)
        work = said.work(np.array([int(context.node_config[PARTITION])]))
        serial = Serial(env.model, env.data, debug=True)
        if kind == "evaluate":
            content = judged(*next(serial.measure(work, env.batch_size)))
        else:
            (block,) = serial.map(work, said.finish)
            content = block.content(0)
        return Message(content if self._given else materialise(content), reply_to=message)

    def answer(self, broadcast: Broadcast, context_of: ContextOf) -> CohortReplies | None:
        """All replies to a broadcast in columns; None if this app has no engine for them."""
        kind, _, action = broadcast.message_type.partition(".")
        if self.engine is None or self._given is None or action not in self._given.programs:
            return None
        if kind not in ("train", "evaluate") or "arrays" not in broadcast.content:
            return None
        if (half := self._given.programs[action]).resident or half.agent:
            return None
        said = Request(broadcast.content, broadcast.message_type, context_of, self._given)
        return CohortReplies(said, broadcast.nodes, self.engine, broadcast.message_to)

    def contents(
        self, messages: Sequence[Message], context_of: ContextOf
    ) -> Iterator[RecordDict | str | None]:
        """What each message's client says, or what went wrong; None: answer it by itself."""
        if self.engine is None or self._given is None:
            return iter([None] * len(messages))
        return contents(messages, context_of, self._given, self.engine)

    def _enrol(self, message: Message, context: Context) -> Message:
        """Say which clients live here."""
        data = self.environment(context).data
        clients = served(context.node_config, data.num_clients)
        train, test = (r.lengths.tolist() for r in (data.train, data.test))
        found = Enrolment(
            tuple(clients),
            tuple(train[c] for c in clients),
            tuple(test[c] for c in clients),
            code.digest(),
        )
        return Message(found.content(), reply_to=message)

    def _deliver(self, message: Message, context: Context, envelope: Envelope) -> Message:
        """Answer for one of the node's clients, with that client's own state.

        Raises:
            RunError: the client does not live here, or its state is damaged.
        """
        client, moment = envelope.client, envelope.moment(message)
        if client not in served(context.node_config, client + 1):
            raise RunError(f"client {client} does not live on this node")
        folder = context.node_config.get(STATE_FOLDER) or self._run_config.get(STATE)
        keeping = Keeping(Path(str(folder)), envelope.run) if folder else None
        prefix = f"{client}/"
        state = (
            keeping.load(client, moment)
            if keeping
            else RecordDict(
                {
                    n.removeprefix(prefix): r
                    for n, r in context.state.items()
                    if n.startswith(prefix)
                }
            )
        )
        own = Context(
            context.run_id,
            context.node_id,
            {**context.node_config, PARTITION: client},
            state,
            context.run_config,
        )
        before = dict(own.state)
        reply = self._answer(message, own)
        if not _same(before, own.state):
            if keeping:
                keeping.save(client, moment, own.state, envelope.floor)
            else:
                kept = materialise(own.state)
                context.state.update({prefix + n: r for n, r in kept.items()})
        return reply


def _same(before: Mapping[str, Any], after: RecordDict) -> bool:
    """Whether the state holds the very same records; work replaces what it changes."""
    return before.keys() == after.keys() and all(r is before[n] for n, r in after.items())
