"""What one client does in one round, written for a single client.

A `LocalProgram` is a frozen dataclass of hyper-parameters with three functions, `init`, `step` and
`final`, over a `LocalState`. It never sees modules, optimizers, data loaders or messages, so the
same text runs on a device, in a debugger, and for a whole cohort with stacked vectors.

Vectors lie on the last axis: reduce with ``dim=-1, keepdim=True`` (see `dot`, `norm`).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedsim.core.criteria import Criterion
from fedsim.core.errors import ConfigError, RunError
from fedsim.core.model import ModelInfo
from fedsim.core.parts import Shapes, fits, shapes_of, widened
from fedsim.core.records import FlatRecord, from_record


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over the last axis, which is kept with length 1."""
    return (a * b).sum(-1, keepdim=True)


def norm(a: Tensor) -> Tensor:
    """Euclidean norm over the last axis, which is kept with length 1."""
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True)


class Batch(NamedTuple):
    """One minibatch of one client.

    Attributes:
        fields: tensors whose first axis is the example; `x`, `y`, and `weight` where padded.
        epoch: number of the epoch, from 0; with stacked vectors a tensor [clients, 1] where
            clients differ.
        step: number of the step in the round, from 0.
    """

    fields: Mapping[str, Tensor]
    epoch: Any
    step: int


@dataclass(frozen=True)
class Mail:
    """What one client was sent, and what it knows besides: see `LocalProgram.opened`.

    Attributes:
        records: the array records, by name.
        own: entries of the model that the client keeps to itself (`LocalProgram.private`), as
            they were initialised where it has kept none yet.
        initial: the initial model, which every client can make for itself.
        seed: seed of the run.
        round: number of the round, from 1.
        client: partition number.
    """

    records: Mapping[str, ArrayRecord]
    own: Mapping[str, Tensor]
    initial: FlatRecord
    seed: int
    round: int
    client: int


class Gradient:
    """A gradient of the training loss over the trainable parameters.

    An executor may keep it in factors; `dense` gives the vector.
    """

    def __init__(self, vector: Tensor) -> None:
        self._vector = vector

    def dense(self) -> Tensor:
        """The gradient as a vector of shape [p]."""
        return self._vector

    def add_to(self, target: Tensor, alpha: float = 1.0) -> None:
        """``target += alpha * gradient`` in place."""
        target.add_(self._vector, alpha=alpha)


class LocalState:
    """What a program works on: one client's vectors in one round.

    A program may add attributes of its own; those that are vectors have shape [p].

    Attributes:
        w: trainable parameters, shape [p]; change it in place or assign it.
        start: the parameters received from the server; read-only.
        received: other vectors the server sent, by name; read-only.
        kept: the program's `keeps`, as the client left them last time (zeros at first); assign to
            change them.
        sent: vectors to reply with besides the model, by name.
        metrics: numbers to reply with.
        num_steps: local steps of this round; [C, 1] with stacked vectors, as `num_examples`.
        num_examples: training examples of this client.
        round: number of the round, from 1.
        losses: training loss of each gradient so far, scalars.
    """

    w: Tensor
    start: Tensor
    num_steps: Any
    num_examples: Any
    round: int
    losses: list[Tensor]

    def __init__(self) -> None:
        self.received: MutableMapping[str, Tensor] = {}
        self.kept: MutableMapping[str, Tensor] = {}
        self.sent: MutableMapping[str, Tensor] = {}
        self.metrics: MutableMapping[str, Any] = {}

    def gradient(self, batch: Batch, at: Tensor | None = None, training: bool = True) -> Gradient:
        """Gradient of the program's loss on `batch`, at `w` or at another point of shape [p].

        Args:
            batch: the minibatch.
            at: where to differentiate; BatchNorm statistics follow only gradients taken at `w`.
            training: False evaluates the module in evaluation mode (frozen BatchNorm).
        """
        raise TypeError("a LocalState is made by an executor")

    def move(self, gradient: Gradient, alpha: float) -> None:
        """``w += alpha * gradient``, which an executor may put off until somebody looks at `w`."""
        gradient.add_to(self.w, alpha)

    def loss_at(self, batch: Batch, at: Tensor) -> Tensor:
        """The program's loss on `batch` at another point, shape [1]; module in evaluation mode.

        It does not count as a loss of the training.
        """
        self.gradient(batch, at=at, training=False)
        return self.losses.pop().unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class LocalProgram:
    """Local minibatch SGD, and the base of every client half.

    With velocity v = 0 at the start of each round, every step does
    ``v = momentum * v + gradient + weight_decay * w + correction`` and ``w = w - lr * v``.
    Subclasses usually override `loss`, `correction` or `step` and add fields for what the server
    sends in its `ConfigRecord`.

    Attributes:
        epochs: passes over the client's training examples.
        max_steps: stop after that many steps; 0 means no limit.
        batch_size: examples per step; the last batch of an epoch may be smaller.
        lr: learning rate.
        momentum: heavy-ball momentum, reset every round.
        weight_decay: coefficient of the L2 term in the gradient.
        frozen_bn: train with the module in evaluation mode (BatchNorm statistics frozen).
    """

    replies: ClassVar[str] = "model"
    """What goes back as `arrays`: the ``"model"``, or its ``"delta"`` to the received one."""
    keeps: ClassVar[tuple[str, ...]] = ()
    """Names of vectors of shape [p] that stay on the client between its rounds."""
    vectorized: ClassVar[bool] = True
    """Whether `init`, `step` and `final` also hold for stacked vectors of shape [clients, p]."""
    axial_loss: ClassVar[bool] = False
    """Whether `loss` reduces last axes only: with one more axis in front it gives a loss for each
    of its entries, when the criterion does."""
    resident: ClassVar[bool] = False
    """Whether it works in place on the one resident model (`fedsim.core.resident`)."""
    agent: ClassVar[bool] = False
    """Whether it answers messages by itself (`fedsim.core.agent`)."""
    opens: ClassVar[tuple[str, ...]] = ("arrays",)
    """Names of the records that `opened` makes the model from; others arrive as vectors."""
    own_start: ClassVar[bool] = False
    """Whether clients who are sent the same start from different models."""

    epochs: int = 1
    max_steps: int = 0
    batch_size: int = 10
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    frozen_bn: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """Build the program from a message's configuration; keys that are no fields are ignored.

        Raises:
            ConfigError: a value has the wrong type.
        """
        values: dict[str, Any] = {}
        for f in fields(cls):
            if f.name not in config:
                continue
            value, default = config[f.name], f.default
            if isinstance(default, float) and type(value) is int:
                value = float(value)
            if type(value) is not type(default):
                raise ConfigError(
                    f"{cls.__name__}.{f.name} = {value!r} must be a {type(default).__name__}"
                )
            values[f.name] = value
        return cls(**values)

    @property
    def passes(self) -> float:
        """What an example costs in a local step, in forward passes; for the simulated clock.

        Default: a gradient. A backward pass is two products, for the inputs and for the weights.
        """
        return 3.0

    def fitted(self, info: ModelInfo) -> Self:
        """The program for a model of which only now something is known; default: as it is."""
        return self

    def private(self, info: ModelInfo) -> frozenset[str]:
        """Names of the model entries that never leave the client (personal layers)."""
        return frozenset()

    def opened(self, info: ModelInfo, mail: Mail) -> Mapping[str, Tensor]:
        """The model that work starts from: all its entries, in the model's shapes.

        Default: what was sent, with zeros around entries of which only a part was sent; what was
        not sent is the client's own, or as at first where only the server could change it.

        Raises:
            RunError: entries are unknown, missing, or too large.
        """
        sent, layout = from_record(mail.records["arrays"]), info.layout
        rest = mail.initial.state()
        rest = {n: rest[n] for n in info.still} | dict(mail.own)
        extra, missing = set(sent) - set(layout.names), set(layout.names) - set(sent) - set(rest)
        if extra or missing:
            raise RunError(
                f"the received model has unexpected entries {sorted(extra)} and lacks "
                f"{sorted(missing)}"
            )
        if not fits(shapes_of(mail.records["arrays"]), layout):
            raise RunError("the received model has entries of other shapes than this model's")
        shapes = zip(layout.names, layout.shapes, strict=True)
        return {n: widened(sent[n], shape) if n in sent else rest[n] for n, shape in shapes}

    def answers(self, info: ModelInfo, sent: Shapes) -> Shapes:
        """Entries of the model that go back, and how much of each: their shapes.

        Args:
            info: the model.
            sent: shapes of the entries that were sent, which is the default.
        """
        return sent

    def personalise(self) -> LocalProgram | None:
        """Local training before the model is judged on the client's held-out examples, or None."""
        return None

    def loss(
        self, criterion: Criterion, outputs: Tensor, target: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Training loss of one batch, a scalar.

        Args:
            criterion: the task's own loss.
            outputs: what the model returns, for example logits of shape [B, classes].
            target: targets, for example labels of shape [B].
            weight: weight of each example, shape [B], zero for padding; None means all ones.
        """
        return criterion(outputs, target, weight)

    def correction(self, s: LocalState) -> Tensor | None:
        """A vector to add to every gradient (proximal pull, control variate), or None."""
        return None

    def init(self, s: LocalState) -> None:
        """Before the first step."""

    def step(self, s: LocalState, batch: Batch) -> None:
        """One local step: changes `s.w`."""
        self.descend(s, s.gradient(batch, training=not self.frozen_bn))

    def final(self, s: LocalState) -> None:
        """After the last step: fill `s.sent`, `s.kept`, `s.metrics`."""

    def descend(self, s: LocalState, gradient: Gradient) -> None:
        """The SGD update of the class docstring, from a gradient."""
        extra = self.correction(s)
        if self.weight_decay:
            decay = s.w * self.weight_decay
            extra = decay if extra is None else extra + decay
        if self.momentum:
            v = getattr(s, "velocity", None)
            v = torch.zeros_like(s.w) if v is None else v.mul_(self.momentum)
            gradient.add_to(v)
            if extra is not None:
                v.add_(extra)
            s.velocity = v  # type: ignore[attr-defined]
            s.w.add_(v, alpha=-self.lr)
            return
        s.move(gradient, -self.lr)
        if extra is not None:
            s.w.add_(extra, alpha=-self.lr)
