"""The `LocalState` of a block of clients: the program's text, run on stacked vectors.

Clients of a block are sorted by number of steps, most first. So those who still have a step to do
are always the first n, and whatever the program reads or assigns during a step is that prefix:
the others keep what they had after their own last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core.bulk import Rows
from fedsim.core.model import FlatModel
from fedsim.core.program import Batch, Gradient, LocalProgram, LocalState
from fedsim.runtime.factors import ChainGradient, Moved, Point, Views
from fedsim.runtime.layers import Loss, Stackable


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

    Clients who share their start are first kept as what moved them (`Moved`), where that is thin;
    their models are written down when somebody looks at them.

    Args:
        start: what clients start from, shape [layout.size] if it is the same for all, or [C, ...].
        size: number of clients C.
        room: gives memory for their models, shape [C, layout.size].
        program: what the clients run.
        model: the model.
        engine: differentiates it at stacked parameters.
        thin: whether the clients take so few steps that they are kept as what moved them.
    """

    def __init__(
        self,
        start: Tensor,
        size: int,
        room: Callable[[], Tensor],
        program: LocalProgram,
        model: FlatModel,
        engine: Stackable,
        thin: bool = False,
    ) -> None:
        prefix = Prefix(size)
        vars(self).update(prefix=prefix, _own=StackedVectors(prefix), _flat=None)
        self._room, self._moved = room, Moved(model.layout, start, size)
        self.received, self.kept, self.sent, self.metrics = (
            StackedVectors(prefix) for _ in range(4)
        )
        self._model, self._engine, self._program = model, engine, program
        self._loss = Loss.by(program)
        self.start = start[..., : model.layout.num_trainable]
        # While nobody has written to `flat`, all rows are `start`, and products can be shared.
        self._shared = model.layout.views(start) if start.dim() == 1 else None
        self._thin = thin and start.dim() == 1
        self._version = self._active = 0
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

    def rows(self) -> Rows:
        """The clients' models."""
        if vars(self)["_flat"] is not None or self._shared is None:
            return Rows(self.flat)
        return self._moved

    @property
    def flat(self) -> Tensor:
        """The clients' models, written down, shape [C, layout.size]."""
        flat = vars(self)["_flat"]
        if flat is None:
            flat = self._moved.into(self._room())
            if self._moved.moves or self._moved.written:
                self._shared = None
            vars(self).update(_flat=flat, _version=flat._version)
        return flat

    def _here(self) -> tuple[Tensor, Views]:
        """The active clients' trainable parameters, together and by name."""
        active, layout = self.prefix.active, self._model.layout
        if self._active != active:
            part = self.flat[:active]
            here = part[:, : layout.num_trainable], layout.views(part)
            vars(self).update(_active=active, _found=here)
        found: tuple[Tensor, Views] = vars(self)["_found"]
        return found

    @property
    def w(self) -> Tensor:  # type: ignore[override]
        return self._here()[0]

    def _point(self, at: Tensor | None) -> Point:
        """Where to differentiate: at the clients' models, or elsewhere."""
        layout, flat = self._model.layout, vars(self)["_flat"]
        if at is not None:
            return Point({n: layout.view(at, n) for n in layout.trainable})
        if self._shared is not None and (flat is None or flat._version == self._version):
            return self._moved.point(self._shared, self.prefix.active)
        return Point(self._here()[1])

    def move(self, gradient: Gradient, alpha: float) -> None:
        """See `LocalState`."""
        if not isinstance(gradient, ChainGradient):
            gradient.add_to(self.w, alpha)
        elif self._thin and vars(self)["_flat"] is None:
            self._moved.add(gradient, alpha)
        else:
            gradient.into(self._here()[1], alpha)

    def gradient(self, batch: Batch, at: Tensor | None = None, training: bool = True) -> Gradient:
        point, active, fields = self._point(at), self.prefix.active, batch.fields
        x, y, weight = fields["x"], fields["y"], fields.get("weight")
        if len(x) > active:  # a minibatch of an earlier step
            x, y, weight = x[:active], y[:active], None if weight is None else weight[:active]
        losses, gradient = self._engine.gradient(point, x, y, weight, self._loss)
        self.losses.append(losses)
        return gradient

    def mean_losses(self) -> Tensor:
        """Mean over the gradients taken of the training loss, shape [C]."""
        size, lengths = self.prefix.size, np.array([len(losses) for losses in self.losses])
        if (lengths == size).all():
            return torch.stack(self.losses).mean(0)
        each = torch.cat(self.losses)
        owner = np.arange(len(each)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        total = each.new_zeros(size).index_add_(0, torch.from_numpy(owner).to(each.device), each)
        return total / torch.from_numpy(np.bincount(owner, minlength=size)).to(total)
