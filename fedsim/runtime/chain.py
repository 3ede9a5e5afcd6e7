"""Layers in a row with a backward pass written by hand, for the models of many clients at once.

Batched matrix products take the place of one small product for each client, and neither autograd
nor, for plain SGD, the gradient itself is needed. Layers of images in front of them are run client
by client (`fedsim.runtime.images`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.criteria import Criterion
from fedsim.core.model import FlatModel
from fedsim.core.program import Gradient
from fedsim.core.records import Layout
from fedsim.runtime.factors import ChainGradient, Factor, Point, Views, Whole
from fedsim.runtime.images import Convolution, Images, Pooling
from fedsim.runtime.layers import Loss, through_loss

Parts = list[Factor | Whole]
aten = torch.ops.aten
POINTWISE: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.ReLU: (
        torch.relu_,
        lambda slope, out: aten.threshold_backward.grad_input(slope, out, 0, grad_input=slope),
    ),
    nn.Tanh: (
        torch.tanh_,
        lambda slope, out: aten.tanh_backward.grad_input(slope, out, grad_input=slope),
    ),
    nn.Sigmoid: (
        torch.sigmoid_,
        lambda slope, out: aten.sigmoid_backward.grad_input(slope, out, grad_input=slope),
    ),
}
"""Layers that work entry by entry, in place: the outputs from the inputs, and the slope of the
inputs from that of the outputs and these."""


class Layer(ABC):
    """One layer, for inputs [C, B, ...]."""

    @abstractmethod
    def forward(self, point: Point, x: Tensor, tape: list[Any]) -> Tensor:
        """What the layer gives; one thing that its backward pass needs goes onto the tape."""

    @abstractmethod
    def backward(self, point: Point, slope: Tensor, kept: Any, parts: Parts) -> Tensor:
        """The slope of the inputs.

        Args:
            point: where.
            slope: that of the outputs.
            kept: what `forward` put onto the tape.
            parts: the layer adds its own gradient.
        """


@dataclass(frozen=True)
class Flat(Layer):
    """One axis for all axes of an example."""

    def forward(self, point: Point, x: Tensor, tape: list[Any]) -> Tensor:
        tape.append(x.shape)
        return x.flatten(2)

    def backward(self, point: Point, slope: Tensor, kept: Any, parts: Parts) -> Tensor:
        return slope.view(kept)


@dataclass(frozen=True)
class Pointwise(Layer):
    """A function of each entry.

    Attributes:
        kind: of the module.
        fresh: whether nobody else needs the inputs: the layer before made and does not keep them.
    """

    kind: type[nn.Module]
    fresh: bool = False

    def __call__(self, x: Tensor, own: Views) -> Tensor:
        """As an `ImageLayer`."""
        return POINTWISE[self.kind][0](x if self.fresh else x.clone())

    def forward(self, point: Point, x: Tensor, tape: list[Any]) -> Tensor:
        out = self(x, {})
        tape.append(out)
        return out

    def backward(self, point: Point, slope: Tensor, kept: Any, parts: Parts) -> Tensor:
        return POINTWISE[self.kind][1](slope, kept)


@dataclass(frozen=True)
class Dense(Layer):
    """A Linear layer; any axes between examples and features count as more examples.

    Attributes:
        weight: name of the weight.
        bias: name of the bias, if there is one.
        lowest: whether no layer below has parameters.
    """

    weight: str
    bias: str | None
    lowest: bool = True

    def own(self, point: Point) -> tuple[Tensor, Tensor | None]:
        """Weight and bias: stacked [C, ...], or as they are where clients share them."""
        return point.values[self.weight], point.values[self.bias] if self.bias else None

    def forward(self, point: Point, x: Tensor, tape: list[Any]) -> Tensor:
        x = x.flatten(1, -2) if x.dim() > 3 else x
        tape.append(x)
        weight, bias = self.own(point)
        if weight.dim() == 3:
            if bias is None:
                return torch.bmm(x, weight.mT)
            return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
        out = nn.functional.linear(x, weight, bias)
        for move in point.moves.get(self.weight, ()):
            slope, inputs = move.first(len(x))
            share = torch.bmm(x, inputs.mT)
            out.baddbmm_(share if bias is None else share.add_(1.0), slope)
        return out

    def backward(self, point: Point, slope: Tensor, kept: Any, parts: Parts) -> Tensor:
        parts.append(Factor(self.weight, self.bias, slope, kept))
        weight, _ = self.own(point)
        if self.lowest:
            return slope
        if weight.dim() == 3:
            return torch.bmm(slope, weight)
        below = slope @ weight
        for move in point.moves.get(self.weight, ()):
            before, inputs = move.first(len(slope))
            below.baddbmm_(torch.bmm(slope, before.mT), inputs)
        return below


@dataclass(frozen=True)
class Chain:
    """Layers in a row.

    Attributes:
        layout: of the model.
        criterion: the task's loss.
        images: layers of images that are run first, if there are any.
        layers: what is run then, the first one first.
        lowest: number of the first of these that is differentiated.
        full: whether no target is to be ignored.
    """

    layout: Layout
    criterion: Criterion
    images: Images | None
    layers: tuple[Layer, ...]
    lowest: int
    full: bool

    @staticmethod
    def of(model: FlatModel, full: bool = False) -> Chain | None:
        """The model as a chain, or None if it is none.

        Args:
            model: the model.
            full: whether no target of the data is to be ignored.
        """
        layers, layout = _unfold(model.module), model.layout
        if layers is None:
            return None
        owned = {n for one in layers if isinstance(one, WEIGHTED) for n in _names(one)}
        if not owned or not owned == set(layout.names) == set(layout.trainable):
            return None
        front, rest = _split(layers)
        if any(isinstance(one, IMAGES) for one in rest):
            return None
        axes = {n: len(layout.shapes[layout.names.index(n)])
                for one in front if isinstance(one, Convolution) for n in _names(one)}  # fmt: skip
        dense = [i for i, one in enumerate(rest) if isinstance(one, Dense)]
        lowest = 0 if axes else dense[0] if dense else len(rest)
        images = Images(front, axes) if front else None
        return Chain(layout, model.criterion, images, tuple(rest), lowest, full)

    def thin(self, visits: int) -> bool:
        """See `Stackable`: whether the factors are smaller than the weights they stand for."""
        if self.layout.dtype not in (torch.float32, torch.float64):
            return False
        dense = [shape for shape in self.layout.shapes if len(shape) == 2]
        return visits * sum(map(sum, dense)) < sum(map(math.prod, dense))

    @property
    def looped(self) -> bool:
        """See `Stackable`."""
        return self.images is not None

    def outputs(self, values: Views, x: Tensor) -> Tensor:
        """See `Stackable`."""
        features = self.images.outputs(values, x) if self.images else x
        out = self._forward(Point(values), features)[0]
        return out.view(*x.shape[: 2 if self.criterion.name != "next_token" else 3], -1)

    def _forward(self, point: Point, x: Tensor) -> tuple[Tensor, list[Any]]:
        tape: list[Any] = []
        for layer in self.layers:
            x = layer.forward(point, x, tape)
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
        features, seen = self.images.forward(point.values, x) if self.images else (x, [])
        outputs, tape = self._forward(point, features)
        shown = outputs
        if self.criterion.classifies:
            shown = outputs.view(*y.shape, -1)
        losses, slope = (
            self.criterion.stacked(shown, y, weight, self.full)
            if loss is None
            else through_loss(loss, self.criterion, shown, y, weight)
        )
        slope, parts = slope.reshape(outputs.shape), Parts()
        for layer in reversed(self.layers[self.lowest :]):
            slope = layer.backward(point, slope, tape.pop(), parts)
        if self.images:
            parts += self.images.backward(slope, seen)
        return losses, ChainGradient(self.layout, parts)


AnyLayer = Layer | Convolution | Pooling
IMAGES, WEIGHTED = (Convolution, Pooling), (Convolution, Dense)


def _names(one: Convolution | Dense) -> list[str]:
    """A layer's parameters."""
    return [one.weight, *([one.bias] if one.bias else [])]


def _split(layers: list[AnyLayer]) -> tuple[list[Any], list[Any]]:
    """Layers of images, which end at a `Flat`, and all after it."""
    if not any(isinstance(one, IMAGES) for one in layers):
        return [], layers
    end = next((i for i, one in enumerate(layers) if isinstance(one, Flat | Dense)), len(layers))
    flat = end < len(layers) and isinstance(layers[end], Flat)
    return (layers[:end], layers[end + 1 :]) if flat else ([], layers)


def _unfold(module: nn.Module) -> list[AnyLayer] | None:
    """The layers of nested `Sequential` modules; None if one is unknown."""
    layers: list[AnyLayer] = []
    for name, one in module.named_modules():
        if type(one) in (nn.Sequential, nn.Identity):
            continue
        layer = _layer(f"{name}." if name else "", one)
        if layer is None or one._forward_hooks or one._forward_pre_hooks:
            return None
        if isinstance(layer, Dense) and any(isinstance(below, WEIGHTED) for below in layers):
            layer = replace(layer, lowest=False)
        if isinstance(layer, Pooling) and layers and layers[-1] == Pointwise(nn.ReLU):
            layers.insert(-1, layer)  # the largest entry is the same, and there are fewer to cut
            continue
        layers.append(layer)
    for i, (below, layer) in enumerate(pairwise(layers), 1):
        if isinstance(layer, Pointwise) and isinstance(below, Convolution | Pooling | Dense):
            layers[i] = replace(layer, fresh=True)
    return layers


def _layer(prefix: str, one: nn.Module) -> AnyLayer | None:
    """A module as a layer of a chain, a Linear one as if it were the lowest."""
    kind: Any = type(one)
    module: Any = one
    if kind in (nn.Linear, nn.Conv2d):
        names = f"{prefix}weight", None if module.bias is None else f"{prefix}bias"
        if kind is nn.Linear:
            return Dense(*names)
        if module.padding_mode == "zeros" and not isinstance(module.padding, str):
            shape = module.stride, module.padding, module.dilation
            return Convolution(*names, shape, module.groups)
    if kind is nn.MaxPool2d and not module.return_indices:
        pairs = module.kernel_size, module.stride, module.padding, module.dilation
        return Pooling((*map(_pair, pairs), module.ceil_mode))
    if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return Flat()
    return Pointwise(kind) if kind in POINTWISE else None


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
