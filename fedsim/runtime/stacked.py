"""The `LocalState` of a block of clients: the program's text, run on stacked vectors.

Clients of a block are sorted by number of steps, most first. So those who still have a step to do
are always the first n, and whatever the program reads or assigns during a step is that prefix:
the others keep what they had after their own last step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from fedsim.core.model import FlatModel
from fedsim.core.program import Batch, Gradient, LocalProgram, LocalState
from fedsim.runtime.layers import Point, Stackable


class Prefix:
    """How many clients of a block are active: the first so many."""

    def __init__(self, size: int) -> None:
        self.size = self.active = size

    def read(self, value: Any) -> Any:
        """The active clients' part of a stacked value; other values as they are."""
        if self.active < self.size and isinstance(value, Tensor) and value.dim() > 1:
            return value.narrow(0, 0, self.active)
        return value

    def write(self, old: Any, new: Any) -> Any:
        """What to keep after the active clients' part became `new`."""
        if self.active == self.size or not isinstance(new, Tensor) or new.dim() < 2:
            return new
        if not isinstance(old, Tensor) or old.dim() != new.dim():
            old = new.new_zeros(self.size, *new.shape[1:])
        if new.data_ptr() == old.data_ptr():  # changed in place
            return old
        return torch.cat([new, old[self.active :]])


class StackedVectors(MutableMapping[str, Any]):
    """Vectors by name; reads and writes go to the active clients' part."""

    def __init__(self, prefix: Prefix, shared: Mapping[str, Any] | None = None) -> None:
        self._prefix = prefix
        self.whole: dict[str, Any] = dict(shared or {})

    def __getitem__(self, name: str) -> Any:
        return self._prefix.read(self.whole[name])

    def __setitem__(self, name: str, value: Any) -> None:
        self.whole[name] = self._prefix.write(self.whole.get(name), value)

    def __delitem__(self, name: str) -> None:
        del self.whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)


class StackedState(LocalState):
    """A `LocalState` for a block of clients; vectors have shape [active clients, p].

    Args:
        flat: the clients' models, shape [C, layout.size]; changed in place.
        start: what they start from, shape [layout.size] if it is the same for all, or as `flat`.
        program: what the clients run.
        model: the model.
        engine: differentiates it at stacked parameters.
    """

    flat: Tensor

    def __init__(
        self,
        flat: Tensor,
        start: Tensor,
        program: LocalProgram,
        model: FlatModel,
        engine: Stackable,
    ) -> None:
        prefix = Prefix(len(flat))
        vars(self).update(prefix=prefix, flat=flat, _own=StackedVectors(prefix))
        self.received, self.kept, self.sent, self.metrics = (
            StackedVectors(prefix) for _ in range(4)
        )
        self._model, self._engine, self._program = model, engine, program
        self._loss = None if type(program).loss is LocalProgram.loss else program.loss
        self.start = start[..., : model.layout.num_trainable]
        # While nobody has written to `flat`, all rows are `start`, and products can be shared.
        self._shared = model.layout.views(start) if start.dim() == 1 else None
        self._version = flat._version
        self._views, self._active = model.layout.views(flat), 0
        self.losses: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        own = vars(self)["_own"]
        if name not in own:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return own[name]

    def __setattr__(self, name: str, value: Any) -> None:
        own = vars(self)["_own"]
        if name == "w":
            self.w.copy_(value)
        elif isinstance(value, Tensor):
            own[name] = value
        else:
            own.pop(name, None)
            vars(self)[name] = value

    def _here(self) -> Point:
        """The active clients' parameters; the same tensors until others are active."""
        active, layout = self.prefix.active, self._model.layout
        if self._active != active:
            views = {n: v[:active] for n, v in self._views.items()}
            w = self.flat[:active, : layout.num_trainable]
            vars(self).update(_active=active, _point=Point(views, w, views))
        point: Point = vars(self)["_point"]
        return point

    @property
    def w(self) -> Tensor:  # type: ignore[override]
        return self._here().w

    def gradient(self, batch: Batch, at: Tensor | None = None, training: bool = True) -> Gradient:
        point, active, fields = self._here(), self.prefix.active, batch.fields
        if at is not None:
            moved = {n: self._model.layout.view(at, n) for n in self._model.layout.trainable}
            point = point._replace(values={**point.values, **moved})
        elif self._shared is not None and self.flat._version == self._version:
            point = point._replace(values=self._shared)
        weight = fields.get("weight")
        losses, gradient = self._engine.gradient(
            point,
            fields["x"][:active],
            fields["y"][:active],
            None if weight is None else weight[:active],
            self._loss,
        )
        self.losses.append(losses)
        return gradient

    def mean_losses(self) -> Tensor:
        """Mean over the gradients taken of the training loss, shape [C]; NaN without any."""
        if self.losses and all(len(losses) == len(self.flat) for losses in self.losses):
            return torch.stack(self.losses).mean(0)
        total, count = torch.zeros_like(self.flat[:, 0]), torch.zeros_like(self.flat[:, 0])
        for losses in self.losses:
            total[: len(losses)] += losses
            count[: len(losses)] += 1
        return total / count
