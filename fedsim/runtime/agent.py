"""Runs agents: clients that answer for themselves, with a model and a memory of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim.core import rng
from fedsim.core.agent import CENTRAL, MODEL, Agent, AgentState, Trained
from fedsim.core.averaging import EXAMPLES
from fedsim.core.model import FlatModel
from fedsim.core.oracle import Items, Query
from fedsim.core.program import LocalProgram
from fedsim.core.records import FlatRecord, TensorArray, as_flat, from_record
from fedsim.data import Ragged
from fedsim.runtime.cohort import Work
from fedsim.runtime.oracles import name_of
from fedsim.runtime.serial import Serial
from fedsim.runtime.work import PARTITION, Environment, action_of, judged

SETTLED = "settled"
"""Key of the last round that counted, in the configuration of servers that say so."""
_ROUND = "$round"


class OneAgent(AgentState):
    """The state of one client, over its context.

    Args:
        content: what it was sent.
        client: partition number.
        program: what it runs.
        context: where it keeps things.
        env: data, models, and the oracle.
        training: whether it is a train message.
    """

    def __init__(
        self,
        content: RecordDict,
        client: int,
        program: Agent,
        context: Context,
        env: Environment,
        training: bool = True,
    ) -> None:
        super().__init__()
        config = content.config_records.get("config", ConfigRecord())
        self.records, self.config = content.array_records, dict(config)
        self.client, self._env, self._context = client, env, context
        self._training = training
        self.seed = int(cast(int, config.get("seed", 0)))
        self.round = int(cast(int, config.get("server-round", 0)))
        self._settled = int(cast(int, config.get(SETTLED, self.round)))
        self._prefix = f"{type(program).__name__}."
        self.model: FlatModel = env.model_of(client)
        data = env.data
        self.rows, self.fields = torch.from_numpy(np.array(data.train[client])), data.fields
        self.num_examples = len(self.rows)
        self.public, self.public_digest = torch.from_numpy(data.public), data.public_digest
        self.info, self.initial = self.model.info, self.model.initial()
        self.criterion, self.num_outputs = self.model.criterion, data.num_outputs

    def stream(self, purpose: str) -> np.random.Generator:
        return rng.stream(self.seed, self.round, self.client, purpose)

    def keep(self, name: str, values: ArrayRecord | Mapping[str, Tensor]) -> None:
        tensors = from_record(values) if isinstance(values, ArrayRecord) else values
        stamped = {**tensors, _ROUND: torch.tensor(self.round)}
        record = ArrayRecord({n: TensorArray(t.detach().clone()) for n, t in stamped.items()})
        state, key = self._context.state, self._prefix + name
        before = state.array_records.get(key)
        settled = self.config.get(SETTLED)
        if before is not None and settled is not None and self._round_of(before) <= self._settled:
            state[f"{key}.before"] = before
        state[key] = record

    def kept(self, name: str) -> dict[str, Tensor] | None:
        records, key = self._context.state.array_records, self._prefix + name
        for place in (key, f"{key}.before"):
            record = records.get(place)
            if record is None:
                continue
            same = self._training and self._round_of(record) == self.round  # in an earlier phase
            if same or self._round_of(record) <= self._settled:
                return {n: t for n, t in from_record(record).items() if n != _ROUND}
        return None

    @staticmethod
    def _round_of(record: ArrayRecord) -> int:
        return int(from_record(record)[_ROUND])

    def kept_model(self, name: str = MODEL) -> FlatRecord | None:
        state, layout = self.kept(name), self.model.layout
        if state is None:
            return None
        return FlatRecord(layout, layout.flatten(state), {n: state[n] for n in layout.beside})

    def train(
        self,
        program: LocalProgram,
        start: FlatRecord,
        rows: Tensor | None = None,
        kept: Mapping[str, Tensor] | None = None,
        fields: Mapping[str, Tensor] | None = None,
    ) -> Trained:
        own = (self.rows if rows is None else rows).numpy()
        lengths = np.zeros(self.client + 1, np.int64)
        lengths[self.client] = len(own)
        data = replace(
            self._env.data,
            fields=dict(self.fields if fields is None else fields),
            train=Ragged.from_lengths(own, lengths),
        )
        clients = np.array([self.client])
        work = Work(
            program, clients, self.round, self.seed, start, {}, {self.client: dict(kept or {})}
        )
        (done,) = Serial(self.model, data, debug=True).map(work, lambda outcomes: outcomes)
        return Trained(
            FlatRecord(self.model.layout, done.flat[0], *done.beside[:1]),
            {n: v[0] for n, v in done.kept.items()},
            {n: float(v[0]) for n, v in done.metrics.items()},
            int(done.num_steps[0]),
        )

    def outputs(self, model: FlatRecord, x: Tensor, training: bool = False) -> Tensor:
        record = as_flat(model, self.model.layout)
        flat, beside = record.flat, dict(record.beside)
        if training:  # a forward pass moves BatchNorm statistics: those of a copy
            flat, beside = flat.clone(), {n: t.clone() for n, t in beside.items()}
        parts = [
            self.model.outputs(flat, beside, part, training)
            for part in x.split(self._env.batch_size)
        ]
        return torch.cat(parts) if len(x) else flat.new_zeros(0, self.num_outputs)

    def features(self, model: FlatRecord, x: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        head = next(iter(self.info.head)).rpartition(".")[0]
        layer = self.model.module.get_submodule(head)
        hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(1)))
        try:
            outputs = self.outputs(model, x)
        finally:
            hook.remove()
        return torch.cat(seen) if seen else outputs, outputs

    def ask(self, query: Query) -> dict[int, int]:
        x, held = self.fields["x"][query.rows], self.fields["y"][query.rows]
        names = [name_of(one) for one in x]
        items = Items(query.client, query.cycle, names, x, held, query.classes)
        return dict(self._env.oracle.label(items))


def answer(message: Message, context: Context, env: Environment) -> RecordDict:
    """The content of an agent's reply to a train or evaluate message.

    Args:
        message: what the client was sent.
        context: says which client it is, and keeps its state.
        env: data, models, client halves, oracle.
    """
    kind, action = action_of(message)
    content = message.content
    config = content.config_records.get("config", ConfigRecord())
    client = int(cast(int, context.node_config[PARTITION]))
    program = cast(Agent, env.programs[action].from_config(config))
    s = OneAgent(content, client, program, context, env, kind == "train")
    if kind == "evaluate":
        rows = env.data.central_test if config.get(CENTRAL) else env.data.test[client]
        index = torch.from_numpy(np.asarray(rows))
        sums = s.model.measure(program.judged(s), env.data.fields, index, env.batch_size).sum(1)
        loss, right, count = sums.tolist()
        return judged(loss / max(count, 1.0), right / max(count, 1.0), len(index))
    program.answer(s)
    metrics: dict[str, Any] = {n: float(v) for n, v in s.metrics.items()}
    metrics[EXAMPLES] = s.num_examples
    reply = RecordDict({**s.replies, "metrics": MetricRecord(metrics)})
    if s.says:
        reply["said"] = ConfigRecord(s.says)
    return reply
