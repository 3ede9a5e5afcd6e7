"""Runs resident programs: one client after another, in place, on one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim.core import rng
from fedsim.core.averaging import EXAMPLES
from fedsim.core.program import Batch, Gradient
from fedsim.core.records import FlatRecord, as_flat
from fedsim.core.resident import ResidentProgram, ResidentState
from fedsim.runtime.plan import Plan
from fedsim.runtime.serial import Fields, PartGradient
from fedsim.runtime.work import PARTITION, Environment, action_of, judged


class OneState(ResidentState):
    """The resident model in the hands of one client."""

    def __init__(
        self, message: Message, client: int, program: ResidentProgram, env: Environment
    ) -> None:
        super().__init__()
        config = message.content.config_records.get("config", ConfigRecord())
        self._program, self._env, self._model = program, env, env.model
        self.records = message.content.array_records
        self.client = client
        self.seed = int(cast(int, config.get("seed", 0)))
        self.round = int(cast(int, config.get("server-round", 0)))
        self._plan = Plan.of(program, env.data.train, np.array([client]), self.seed, self.round)
        self.num_steps, self.num_examples = int(self._plan.steps[0]), int(self._plan.counts[0])
        layout, self.info = env.model.layout, env.model.info
        self.num_parameters = layout.num_trainable
        self.start = env.model.initial().flat[: self.num_parameters]
        spans = [layout.span(n) for n in layout.trainable]
        self.sizes = tuple(s.stop - s.start for s in spans)
        self.measured: list[float] = []

    @property
    def w(self) -> Tensor:
        return self._model.resident.flat[: self.num_parameters]

    @w.setter
    def w(self, value: Tensor) -> None:
        self.w.copy_(value)

    def batches(self) -> Iterator[Batch]:
        for step in range(self.num_steps):
            rows, epoch = self._plan.batch(0, step)
            yield Batch(Fields(self._env.data.fields, torch.from_numpy(rows)), epoch, step)

    def loss(self, batch: Batch) -> float:
        resident, fields = self._model.resident, batch.fields
        outputs = self._model.outputs(resident.flat, resident.beside, fields["x"])
        if outputs.dtype in (torch.float16, torch.bfloat16):
            outputs = outputs.float()  # a loss in half precision is too coarse to be subtracted
        with torch.no_grad():
            value = self._program.loss(
                self._model.criterion, outputs, fields["y"], fields.get("weight")
            )
        return float(value)

    def gradient(self, batch: Batch, at: Tensor | None = None, training: bool = True) -> Gradient:
        if at is not None:
            raise TypeError("a resident program differentiates at w only")
        resident, model = self._model.resident, self._model

        def loss(outputs: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
            return self._program.loss(model.criterion, outputs, target, weight)

        value, parts = model.gradients(resident.flat, resident.beside, batch.fields, loss, training)
        self.measured.append(float(value))
        return PartGradient(model.layout, parts, self.w)

    def stream(self, purpose: str) -> np.random.Generator:
        return rng.stream(self.seed, self.round, self.client, purpose)

    def tensor(self, name: str) -> Tensor:
        model, layout = self._model, self._model.layout
        if name in layout.order:
            return layout.view(model.resident.flat, name)
        found = model.resident.beside.get(name)
        return model.module.get_parameter(name).detach() if found is None else found

    def load(self, flat: Tensor, record: ArrayRecord) -> None:
        given = as_flat(record, self._model.layout)
        flat.copy_(given.flat)
        for name, value in given.beside.items():
            self._model.resident.beside[name].copy_(value)

    def model(self) -> ArrayRecord:
        resident = self._model.resident
        beside = {n: t.clone() for n, t in resident.beside.items()}
        return FlatRecord(self._model.layout, resident.flat.clone(), beside)


def answer(message: Message, context: Context, env: Environment) -> RecordDict:
    """The content of the reply to a train or evaluate message for a resident program.

    Args:
        message: what the client was sent.
        context: says which client it is.
        env: data, model, programs.
    """
    kind, action = action_of(message)
    config = message.content.config_records.get("config", ConfigRecord())
    program = cast(ResidentProgram, env.programs[action].from_config(config))
    client = int(cast(int, context.node_config[PARTITION]))
    s = OneState(message, client, program, env)
    resident = env.model.resident
    resident.restore(
        program.name(s), lambda flat, held: program.rebuild(s, flat, held), program.incremental
    )
    if kind == "evaluate":
        record = FlatRecord(env.model.layout, resident.flat, resident.beside)
        index = torch.from_numpy(np.asarray(env.data.test[client]))
        sums = env.model.measure(record, env.data.fields, index, env.batch_size).sum(1)
        loss, right, count = sums.tolist()
        total = max(count, 1.0)
        return judged(loss / total, right / total, len(index))
    resident.touch()
    key = rng.key(s.seed, s.round, client, "module")
    with rng.isolated(key) if env.model.stochastic else nullcontext():
        program.run(s)
    metrics: dict[str, Any] = {
        EXAMPLES: s.num_examples,
        "steps": s.num_steps,
        **({"loss": float(np.mean(s.measured))} if s.measured else {}),
        **{n: float(v) for n, v in s.metrics.items()},
    }
    return RecordDict({**s.replies, "metrics": MetricRecord(metrics)})
