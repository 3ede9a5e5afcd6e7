"""Client halves that lead their own life: with a model, a pool or a memory that stay with them.

A `LocalProgram` is one round of training, from a model that it was sent. An `Agent` answers
messages of several kinds, decides what to train on, may hold a model of an architecture of its
own, and keeps whatever it needs between messages. It trains by handing `LocalProgram`s to
`AgentState.train`, so the local steps are the same text as everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from flwr.app import ArrayRecord
from torch import Tensor

from fedsim.core.criteria import Criterion
from fedsim.core.errors import RunError
from fedsim.core.model import ModelInfo
from fedsim.core.oracle import Query
from fedsim.core.program import LocalProgram
from fedsim.core.records import FlatRecord, as_flat

CENTRAL = "central"
"""Key of a configuration that asks an agent to judge its model on the central test set."""
Program = TypeVar("Program", bound=LocalProgram)
MODEL = "model"
"""Name under which an agent keeps its model, unless it says otherwise."""


class Trained(NamedTuple):
    """What local training gave.

    Attributes:
        record: the model after it.
        kept: the program's `keeps`.
        metrics: the program's metrics; `loss` is the mean training loss over the steps.
        steps: local steps done.
    """

    record: FlatRecord
    kept: dict[str, Tensor]
    metrics: dict[str, float]
    steps: int


class AgentState:
    """What an `Agent` works with while it answers one message; made by the runtime.

    What it keeps survives the message, on a device also a restart. A server that says ``settled``
    in its configuration names the last round that counted: what was kept in later, abandoned
    rounds is forgotten.

    Attributes:
        records: array records that were sent, by name.
        config: the message's configuration.
        replies: array records to answer with, by name.
        says: strings and numbers to answer with, besides the metrics.
        metrics: numbers to answer with.
        num_examples: training examples to report; all of the client's unless changed.
        seed: seed of the run.
        round: number of the round, from 1.
        client: partition number.
        rows: numbers of the client's training examples, int64.
        fields: all examples, by field.
        public: numbers of the public examples, int64, in their order.
        public_digest: digest of the public examples; empty where there are none.
        info: the client's model.
        initial: its initial values.
        criterion: the task's loss.
        num_outputs: classes.
    """

    records: Mapping[str, ArrayRecord]
    config: Mapping[str, Any]
    num_examples: int
    seed: int
    round: int
    client: int
    rows: Tensor
    fields: Mapping[str, Tensor]
    public: Tensor
    public_digest: str
    info: ModelInfo
    initial: FlatRecord
    criterion: Criterion
    num_outputs: int

    def __init__(self) -> None:
        self.replies: dict[str, ArrayRecord] = {}
        self.says: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}

    def stream(self, purpose: str) -> np.random.Generator:
        """The client's own random stream of this round."""
        raise TypeError("an AgentState is made by the runtime")

    def keep(self, name: str, values: ArrayRecord | Mapping[str, Tensor]) -> None:
        """Keep tensors, or a model, until the next message and beyond."""
        raise TypeError("an AgentState is made by the runtime")

    def kept(self, name: str) -> dict[str, Tensor] | None:
        """What was kept under that name; None if nothing was."""
        raise TypeError("an AgentState is made by the runtime")

    def kept_model(self, name: str = MODEL) -> FlatRecord | None:
        """A model that was kept; None if none was."""
        raise TypeError("an AgentState is made by the runtime")

    def sent_model(self, name: str = "arrays") -> FlatRecord:
        """A model that was sent.

        Raises:
            RunError: it is another architecture's.
        """
        if name not in self.records:
            raise RunError(f"the message brings no record {name!r}")
        record, layout = self.records[name], self.info.layout
        if set(record) != set(layout.names):
            raise RunError(f"record {name!r} holds the model of another architecture")
        return as_flat(record, layout)

    def train(
        self,
        program: LocalProgram,
        start: FlatRecord,
        rows: Tensor | None = None,
        kept: Mapping[str, Tensor] | None = None,
        fields: Mapping[str, Tensor] | None = None,
    ) -> Trained:
        """Run a program as any client would: the same minibatches, the same arithmetic.

        Args:
            program: what to do.
            start: the model to start from; it is not changed.
            rows: examples to train on, numbers int64; None: all of the client's.
            kept: what the program kept before, by name.
            fields: train on these instead of the federation's; `rows` then counts in them.
        """
        raise TypeError("an AgentState is made by the runtime")

    def inputs(self, rows: Tensor) -> Tensor:
        """The inputs of some examples, shape [n, ...]."""
        return self.fields["x"][rows]

    def outputs(self, model: FlatRecord, x: Tensor, training: bool = False) -> Tensor:
        """A model's outputs, shape [n, classes]; in evaluation mode unless `training`."""
        raise TypeError("an AgentState is made by the runtime")

    def features(self, model: FlatRecord, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer is given, shape [n, features], and `outputs`."""
        raise TypeError("an AgentState is made by the runtime")

    def ask(self, query: Query) -> dict[int, int]:
        """Let the oracle label the items of a query.

        Returns:
            the label of each item that was answered, by its place in the query.
        """
        raise TypeError("an AgentState is made by the runtime")


@dataclass(frozen=True, kw_only=True)
class Agent(LocalProgram):
    """Base of client halves that answer for themselves.

    Attributes of `LocalProgram` are those of its local training.
    """

    agent = True
    vectorized = False
    any_model: ClassVar[bool] = False
    """Whether clients may have models of different architectures."""

    def answer(self, s: AgentState) -> None:
        """Answer one train message: fill `s.replies`, `s.metrics`, `s.says`; keep what is needed.

        Everything that may be asked for comes in the configuration.
        """
        raise TypeError(f"{type(self).__name__} does not say what it answers")

    def local(self, kind: type[Program], /, **own: Any) -> Program:
        """A program for `AgentState.train`, with what this client has of its attributes.

        Args:
            kind: class of the program.
            own: values of further attributes, or other ones.
        """
        mine = {f.name: getattr(self, f.name) for f in fields(kind) if hasattr(self, f.name)}
        return kind(**{**mine, **own})

    def judged(self, s: AgentState) -> FlatRecord:
        """The model that is judged when the client is asked to evaluate: default, the one sent."""
        return s.sent_model()
