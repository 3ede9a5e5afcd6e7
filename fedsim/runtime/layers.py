"""Gradients of many clients' models at once: parameters stacked on the first axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import local
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedsim.core.criteria import Criterion
from fedsim.core.model import FlatModel
from fedsim.core.program import Gradient
from fedsim.core.records import Layout
from fedsim.runtime.serial import PartGradient

Loss = Callable[[Criterion, Tensor, Tensor, "Tensor | None"], Tensor]
Views = Mapping[str, Tensor]
SLOPES: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.ReLU: lambda out: out > 0,
    nn.Tanh: lambda out: 1 - out * out,
    nn.Sigmoid: lambda out: out * (1 - out),
}
"""Derivatives of layers that work entry by entry, from what they gave."""
LOOPED = 2
"""Clients whose overridden loss is cheaper one after another than by `vmap`."""


class Point(NamedTuple):
    """Where a block of models is differentiated.

    Attributes:
        values: parameters by name, stacked [C, ...], or as they are if all clients share them.
        w: what is to be changed: the trainable parameters, [C, p].
        views: entries of `w` by name.
    """

    values: Views
    w: Tensor
    views: Views


class Stackable(Protocol):
    """A model that can be differentiated at stacked parameters."""

    def outputs(self, values: Views, x: Tensor) -> Tensor:
        """Outputs for inputs [C, B, ...]; values are stacked [C, ...], or shared as they are."""
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
        return loss(criterion, out, target, share)

    with torch.enable_grad():
        if len(y) <= LOOPED:
            values = torch.stack([one(*own) for own in zip(*given, strict=True)])
        else:
            values = vmap(one)(*given)
        # A client's loss depends on its own outputs alone: the sum's slopes are everybody's own.
        (slopes,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), slopes


class Factor(NamedTuple):
    """The gradient of a linear layer of C clients: ``slope^T @ inputs`` for each."""

    weight: str
    bias: str | None
    slope: Tensor  # [C, n, out]
    inputs: Tensor  # [C, n, in]


class FactorGradient(Gradient):
    """A stacked gradient kept as the factors of its linear layers.

    Added to parameters in place, it is never written down by itself.
    """

    def __init__(self, layout: Layout, factors: list[Factor], w: Tensor, views: Views) -> None:
        self._layout, self._factors, self._w, self._views = layout, factors, w, views

    def dense(self) -> Tensor:
        """The gradient as a vector for each client, shape [C, p]."""
        out = torch.zeros_like(self._w)
        self._write(self._layout.views(out), 1.0, 0.0)
        return out

    def add_to(self, target: Tensor, alpha: float = 1.0) -> None:
        """``target += alpha * gradient`` in place."""
        own = target is self._w  # whose views are there already
        self._write(self._views if own else self._layout.views(target), alpha, 1.0)

    def _write(self, views: Views, alpha: float, beta: float) -> None:
        for weight, bias, slope, inputs in self._factors:
            views[weight].baddbmm_(slope.transpose(1, 2), inputs, beta=beta, alpha=alpha)
            if bias is not None:
                views[bias].add_(slope.sum(1), alpha=alpha)


@dataclass(frozen=True)
class Chain:
    """Flatten, Linear and elementwise layers in a row, with a backward pass written by hand.

    Batched matrix products take the place of one small product for each client; neither autograd
    nor, for plain SGD, the gradient itself is needed.
    """

    layout: Layout
    criterion: Criterion
    layers: tuple[tuple[str, nn.Module], ...]
    lowest: int  # the first layer that is trained
    full: bool  # whether no target is to be ignored

    @staticmethod
    def of(model: FlatModel, full: bool = False) -> Chain | None:
        """The model as a chain, or None if it is none.

        Args:
            model: the model.
            full: whether no target of the data is to be ignored.
        """
        layers, trained = _unfold(model.module, ""), set(model.layout.trainable)
        if layers is None or trained != set(model.layout.names):
            return None
        linear = [i for i, (name, _) in enumerate(layers) if f"{name}weight" in trained]
        if not linear:
            return None
        return Chain(model.layout, model.criterion, tuple(layers), linear[0], full)

    def outputs(self, values: Views, x: Tensor) -> Tensor:
        """See `Stackable`."""
        out = self._forward(values, x)[0]
        return out.view(*x.shape[: 2 if self.criterion.name != "next_token" else 3], -1)

    def _forward(self, values: Views, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs, and what each Linear layer was given and each elementwise one gave."""
        tape = []
        for name, layer in self.layers:
            if isinstance(layer, nn.Linear):
                x = x.flatten(1, -2) if x.dim() > 3 else x
                tape.append(x)
                x = _affine(x, values[f"{name}weight"], values.get(f"{name}bias"))
            elif isinstance(layer, nn.Flatten):
                x = x.flatten(2)
            else:
                x = layer(x)
                tape.append(x)
        return x, tape

    def gradient(
        self,
        point: Point,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
        loss: Loss | None,
    ) -> tuple[Tensor, Gradient]:
        """See `Stackable`."""
        outputs, tape = self._forward(point.values, x)
        shown = outputs
        if self.criterion.classifies:
            shown = outputs.view(*y.shape, -1)
        losses, slope = (
            self.criterion.stacked(shown, y, weight, self.full)
            if loss is None
            else through_loss(loss, self.criterion, shown, y, weight)
        )
        slope, factors = slope.reshape(outputs.shape), list[Factor]()
        for i in range(len(self.layers) - 1, self.lowest - 1, -1):
            name, layer = self.layers[i]
            if isinstance(layer, nn.Linear):
                names = f"{name}weight", f"{name}bias"
                if names[0] in self.layout.names:
                    bias = names[1] if layer.bias is not None else None
                    factors.append(Factor(names[0], bias, slope, tape.pop()))
                if i > self.lowest:
                    slope = _times(slope, point.values[names[0]])
            elif not isinstance(layer, nn.Flatten):
                slope = slope * SLOPES[type(layer)](tape.pop())
        return losses, FactorGradient(self.layout, factors, point.w, point.views)


def _unfold(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]] | None:
    """The layers of nested `Sequential` modules with their prefixes; None if one is unknown."""
    if type(module) is nn.Sequential:
        layers: list[tuple[str, nn.Module]] = []
        for name, child in module.named_children():
            inner = _unfold(child, f"{prefix}{name}.")
            if inner is None:
                return None
            layers += inner
        return layers
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.Identity:
        return []
    flat = type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    return [(prefix, module)] if flat or type(module) in (nn.Linear, *SLOPES) else None


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight^T + bias`` for x [C, n, in]; weight stacked, or shared by all clients."""
    if weight.dim() == 2:
        return nn.functional.linear(x, weight, bias)
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def _times(slope: Tensor, weight: Tensor) -> Tensor:
    """``slope @ weight`` for slope [C, n, out]; weight stacked, or shared by all clients."""
    return torch.bmm(slope, weight) if weight.dim() == 3 else slope @ weight


class Functional:
    """Any other module without state of its own, by `torch.func`."""

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
        criterion, judge = self._model.criterion, loss or Criterion.__call__
        trained = {n: point.values[n] for n in layout.trainable}
        rest = {n: v for n, v in point.values.items() if n not in trained}

        def one(own: Any, other: Any, x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
            outputs = functional_call(module, own | other, (x,))
            return judge(criterion, outputs, y, weight)

        axes = [{n: _axis(v, layout, n) for n, v in part.items()} for part in (trained, rest)]
        call = vmap(grad_and_value(one), in_dims=(*axes, 0, 0, None if weight is None else 0))
        grads, losses = call(trained, rest, x, y, weight)
        return losses, PartGradient(layout, [grads[n] for n in layout.trainable], point.w)


def _axis(value: Tensor, layout: Layout, name: str) -> int | None:
    """0 if the value is stacked, None if it is shared."""
    shape = layout.shapes[layout.names.index(name)]
    return None if tuple(value.shape) == shape else 0
