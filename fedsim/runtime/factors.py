"""What moves the models of many clients, kept in the factors of its matrix products.

The gradient of a Linear layer is a product of two thin matrices. Added to parameters in place it
is never written down; and clients that took only a few steps from one start are that start and
the factors of their steps, which take less memory and fewer passes over it than their models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.core.bulk import Rows
from fedsim.core.program import Gradient
from fedsim.core.records import Layout

Views = Mapping[str, Tensor]


class Factor(NamedTuple):
    """What changes a Linear layer of C clients: ``slope^T @ inputs`` for each."""

    weight: str
    bias: str | None
    slope: Tensor  # [C, n, out]
    inputs: Tensor  # [C, n, in]

    def add_to(self, views: Views, alpha: float, beta: float = 1.0) -> None:
        """``weight += alpha * change``, and the bias too; beta 0 spares reading a zero weight."""
        target = views[self.weight]
        target.baddbmm_(self.slope.mT, self.inputs, beta=beta, alpha=alpha)
        if self.bias is not None:
            views[self.bias].add_(self.slope.sum(1), alpha=alpha)

    def first(self, clients: int) -> tuple[Tensor, Tensor]:
        """Slope and inputs of the first so many clients."""
        return self.slope[:clients], self.inputs[:clients]

    def bounds(self) -> Tensor:
        """At least the norm of each client's change, shape [C]."""
        slope, inputs = (torch.linalg.vector_norm(t, dim=(1, 2)) for t in self[2:])
        return slope * (inputs + math.sqrt(self.slope.shape[1]))


class Point(NamedTuple):
    """Where a block of models is differentiated.

    Attributes:
        values: parameters by name, stacked [C, ...], or as they are if all clients share them.
        moves: what the clients added to shared weights, by name; they have C rows or more.
    """

    values: Views
    moves: Mapping[str, Sequence[Factor]] = {}


class Whole(NamedTuple):
    """What changes one parameter of C clients, written down."""

    name: str
    value: Tensor  # [C, ...]

    def add_to(self, views: Views, alpha: float, beta: float = 1.0) -> None:
        """``parameter += alpha * change``."""
        views[self.name].add_(self.value, alpha=alpha)


class ChainGradient(Gradient):
    """A stacked gradient in parts, one or two for each layer that has parameters."""

    def __init__(self, layout: Layout, parts: Sequence[Factor | Whole]) -> None:
        self.parts, self._layout = parts, layout

    def dense(self) -> Tensor:
        """The gradient as a vector for each client, shape [C, p]."""
        some = self.parts[0][-1]
        out = some.new_zeros(len(some), self._layout.num_trainable)
        self.into(self._layout.views(out), 1.0, 0.0)
        return out

    def add_to(self, target: Tensor, alpha: float = 1.0) -> None:
        """``target += alpha * gradient`` in place."""
        self.into(self._layout.views(target), alpha)

    def into(self, views: Views, alpha: float, beta: float = 1.0) -> None:
        """As `add_to`, for the parameters by name."""
        for part in self.parts:
            part.add_to(views, alpha, beta)


class Moved(Rows):
    """Models of C clients that moved from one start: their large weights are not written down.

    Client k's Linear layer is ``W + slope_k^T @ inputs_k``, as in low-rank adaptation. Parameters
    of other layers are few, and stacked.

    Args:
        layout: of the models.
        start: where all of them start, shape [layout.size]; or, as long as nothing is added, where
            each of them does, [C, layout.size].
        size: number of clients.
    """

    def __init__(self, layout: Layout, start: Tensor, size: int) -> None:
        self._layout, self._start, self._size = layout, start, size
        self._dense: Tensor | None = None
        self.moves: dict[str, list[Factor]] = {}
        self.written: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self._size

    @property
    def dtype(self) -> torch.dtype:
        return self._start.dtype

    def add(self, gradient: ChainGradient, alpha: float) -> None:
        """``models += alpha * gradient``, for the first clients, as many as the gradient has."""
        for part in gradient.parts:
            if isinstance(part, Factor):
                moved = part._replace(slope=part.slope * alpha)
                self.moves.setdefault(part.weight, []).append(moved)
                continue
            if part.name not in self.written:
                start = self._layout.view(self._start, part.name)
                self.written[part.name] = start.expand(self._size, *start.shape).clone()
            self.written[part.name][: len(part.value)].add_(part.value, alpha=alpha)

    def point(self, shared: Views, clients: int) -> Point:
        """Where the first so many clients are.

        Args:
            shared: the start by name.
            clients: how many.
        """
        return Point({**shared, **{n: v[:clients] for n, v in self.written.items()}}, self.moves)

    def dense(self) -> Tensor:
        """See `Rows`."""
        if self._dense is None:
            self._dense = self.into(self._start.new_empty(self._size, len(self._start)))
        return self._dense

    def into(self, flat: Tensor) -> Tensor:
        """Write the models down in the rows of `flat`."""
        views = self._layout.views(flat.copy_(self._start))
        for name, value in self.written.items():
            views[name].copy_(value)
        for move in self._all():
            move.add_to({n: views[n][: len(move.slope)] for n in move[:2] if n}, 1.0)
        return flat

    def bounds(self) -> Tensor:
        """See `Rows`."""
        total = torch.linalg.vector_norm(self._start).expand(self._size).clone()
        for value in self.written.values():
            total += torch.linalg.vector_norm(value.flatten(1), dim=1)
        for move in self._all():
            total[: len(move.slope)] += move.bounds()
        return total

    def mean(self, share: Tensor) -> Tensor:
        """See `Rows`: one product for each layer and step, whatever the number of clients."""
        mean, share = self._start.clone(), share.to(self._start)
        views = self._layout.views(mean)
        for name, value in self.written.items():
            views[name].copy_((share @ value.flatten(1)).view(value.shape[1:]))
        for move in self._all():
            slope = (move.slope * share[: len(move.slope), None, None]).flatten(0, 1)
            views[move.weight].addmm_(slope.t(), move.inputs.flatten(0, 1))
            if move.bias is not None:
                views[move.bias].add_(slope.sum(0))
        return mean

    def _all(self) -> list[Factor]:
        return [move for each in self.moves.values() for move in each]
