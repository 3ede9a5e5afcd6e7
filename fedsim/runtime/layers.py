"""Gradients of many clients' models at once: parameters stacked on the first axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from threading import local
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedsim.core.criteria import Criterion
from fedsim.core.model import FlatModel
from fedsim.core.program import Gradient, LocalProgram
from fedsim.core.records import Layout
from fedsim.runtime.factors import Point, Views
from fedsim.runtime.serial import PartGradient

LOOPED = 2
"""Clients whose overridden loss is cheaper one after another than by `vmap`."""


class Loss(NamedTuple):
    """A program's own loss.

    Attributes:
        of: the loss of one client's batch.
        axial: whether it takes an axis of clients in front of everything (`axial_loss`).
    """

    of: Callable[[Criterion, Tensor, Tensor, Tensor | None], Tensor]
    axial: bool

    @staticmethod
    def by(program: LocalProgram) -> Loss | None:
        """The program's loss, or None if it is the criterion itself."""
        plain = type(program).loss is LocalProgram.loss
        return None if plain else Loss(program.loss, program.axial_loss)


class Stackable(Protocol):
    """A model that can be differentiated at stacked parameters."""

    @property
    def looped(self) -> bool:
        """Whether most of it runs client by client all the same, and outputs are large."""
        ...

    def outputs(self, values: Views, x: Tensor) -> Tensor:
        """Outputs for inputs [C, B, ...]; values are stacked [C, ...], or shared as they are."""
        ...

    def thin(self, visits: int) -> bool:
        """Whether clients who visit so many examples are better kept as `Moved`."""
        ...

    def gradient(
        self,
        point: Point,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
        loss: Loss | None,
    ) -> tuple[Tensor, Gradient]:
        """Losses [C] and the gradient, stacked [C, p].

        Args:
            point: where.
            x: inputs, [C, B, ...].
            y: targets, [C, B] or [C, B, T].
            weight: weights of the examples, [C, B], or None for all ones.
            loss: the program's loss; None for the criterion itself.
        """
        ...


def through_loss(
    loss: Loss, criterion: Criterion, outputs: Tensor, y: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses [C] and slopes of any loss with respect to outputs [C, B, ...]."""
    leaf = outputs.detach().requires_grad_()
    given = (leaf, y) if weight is None else (leaf, y, weight)

    def one(out: Tensor, target: Tensor, share: Tensor | None = None) -> Tensor:
        return loss.of(criterion, out, target, share)

    with torch.enable_grad():
        if loss.axial:
            values = loss.of(replace(criterion, many=True), leaf, y, weight)
        elif len(y) <= LOOPED:
            values = torch.stack([one(*own) for own in zip(*given, strict=True)])
        else:
            values = vmap(one)(*given)
        # A client's loss depends on its own outputs alone: the sum's slopes are everybody's own.
        (slopes,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), slopes


class Functional:
    """Any module without state of its own, by `torch.func`."""

    looped = False

    def __init__(self, model: FlatModel) -> None:
        self._model, self._own = model, local()

    @property
    def _module(self) -> nn.Module:
        """The calling thread's own: a call puts the parameters into the module for a while."""
        if not hasattr(self._own, "module"):
            self._own.module = self._model.replica().module
        module: nn.Module = self._own.module
        return module

    def outputs(self, values: Views, x: Tensor) -> Tensor:
        """See `Stackable`."""
        module = self._module
        axes = {n: _axis(v, self._model.layout, n) for n, v in values.items()}
        call = vmap(lambda v, x: functional_call(module, v, (x,)), in_dims=(axes, 0))
        outputs: Tensor = call(dict(values), x)
        return outputs

    def thin(self, visits: int) -> bool:
        """See `Stackable`: gradients have no factors here."""
        return False

    def gradient(
        self,
        point: Point,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
        loss: Loss | None,
    ) -> tuple[Tensor, Gradient]:
        """See `Stackable`."""
        module, layout = self._module, self._model.layout
        criterion, judge = self._model.criterion, loss.of if loss else Criterion.__call__
        trained = {n: point.values[n] for n in layout.trainable}
        rest = {n: v for n, v in point.values.items() if n not in trained}

        def one(own: Any, other: Any, x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
            outputs = functional_call(module, own | other, (x,))
            return judge(criterion, outputs, y, weight)

        axes = [{n: _axis(v, layout, n) for n, v in part.items()} for part in (trained, rest)]
        call = vmap(grad_and_value(one), in_dims=(*axes, 0, 0, None if weight is None else 0))
        grads, losses = call(trained, rest, x, y, weight)
        like = losses.new_empty(len(losses), layout.num_trainable)
        return losses, PartGradient(layout, [grads[n] for n in layout.trainable], like)


def _axis(value: Tensor, layout: Layout, name: str) -> int | None:
    """0 if the value is stacked, None if it is shared."""
    shape = layout.shapes[layout.names.index(name)]
    return None if tuple(value.shape) == shape else 0
