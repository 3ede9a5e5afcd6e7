"""Layers in a row with a backward pass written by hand, for the models of many clients at once.

Batched matrix products take the place of one small product for each client, and neither autograd
nor, for plain SGD, the gradient itself is needed. Convolutions run client by client, with
channels last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.criteria import Criterion
from fedsim.core.model import FlatModel
from fedsim.core.program import Gradient
from fedsim.core.records import Layout
from fedsim.runtime.factors import ChainGradient, Factor, Views, Whole
from fedsim.runtime.layers import Loss, Point, through_loss

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
    """One layer; images have shape [C, B, channels, height, width]."""

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

    def forward(self, point: Point, x: Tensor, tape: list[Any]) -> Tensor:
        out = POINTWISE[self.kind][0](x if self.fresh else x.clone())
        tape.append(out)
        return out

    def backward(self, point: Point, slope: Tensor, kept: Any, parts: Parts) -> Tensor:
        return POINTWISE[self.kind][1](slope, kept)


@dataclass(frozen=True)
class Weighted(Layer):
    """A layer with parameters.

    Attributes:
        weight: name of the weight.
        bias: name of the bias, if there is one.
        lowest: whether no layer below has parameters.
    """

    weight: str
    bias: str | None
    lowest: bool

    def own(self, point: Point) -> tuple[Tensor, Tensor | None]:
        """Weight and bias: stacked [C, ...], or as they are where clients share them."""
        return point.values[self.weight], point.values[self.bias] if self.bias else None


class Dense(Weighted):
    """A Linear layer; any axes between examples and features count as more examples."""

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
class Convolution(Weighted):
    """A Conv2d layer.

    Attributes:
        shape: stride, padding and dilation.
        groups: into which channels are split.
    """

    shape: tuple[Any, Any, Any]
    groups: int

    def forward(self, point: Point, x: Tensor, tape: list[Any]) -> Tensor:
        images = [_channels_last(own) for own in x]
        tape.append(images)
        return _stack(
            [
                torch.conv2d(own, weight, bias, *self.shape, self.groups)
                for own, (weight, bias) in zip(images, self._each(point, len(x)), strict=True)
            ]
        )

    def backward(self, point: Point, slope: Tensor, kept: Any, parts: Parts) -> Tensor:
        mask = not self.lowest, True, self.bias is not None
        rest = *self.shape, False, (0, 0), self.groups, mask  # not transposed
        found = [
            aten.convolution_backward(_channels_last(own), images, weight, [len(weight)], *rest)
            for own, images, (weight, _) in zip(
                slope, kept, self._each(point, len(slope)), strict=True
            )
        ]
        below, weights, biases = zip(*found, strict=True)
        parts.append(Whole(self.weight, _stack(weights)))
        if self.bias is not None:
            parts.append(Whole(self.bias, _stack(biases)))
        return slope if self.lowest else _stack(below)

    def _each(self, point: Point, clients: int) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each client."""
        weight, bias = self.own(point)
        if weight.dim() == 4:
            return [(weight, bias)] * clients
        return list(zip(weight, [None] * clients if bias is None else bias, strict=True))


@dataclass(frozen=True)
class Pooling(Layer):
    """A MaxPool2d layer.

    Attributes:
        shape: kernel, stride, padding, dilation, and whether sizes are rounded up.
    """

    shape: tuple[Any, ...]

    def forward(self, point: Point, x: Tensor, tape: list[Any]) -> Tensor:
        images = _channels_last(x.flatten(0, 1))
        out, places = aten.max_pool2d_with_indices(images, *self.shape)
        tape.append((images, places))
        return out.unflatten(0, x.shape[:2])

    def backward(self, point: Point, slope: Tensor, kept: Any, parts: Parts) -> Tensor:
        slopes, (images, places) = _channels_last(slope.flatten(0, 1)), kept
        below = aten.max_pool2d_with_indices_backward(slopes, images, *self.shape, places)
        return below.unflatten(0, slope.shape[:2])


IMAGES = Convolution | Pooling


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Stacked on a new first axis, one tensor as it is."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))


@dataclass(frozen=True)
class Chain:
    """Layers in a row.

    Attributes:
        layout: of the model.
        criterion: the task's loss.
        layers: what is run, the first one first.
        lowest: number of the first layer that has parameters.
        full: whether no target is to be ignored.
        images: whether there are layers of images.
    """

    layout: Layout
    criterion: Criterion
    layers: tuple[Layer, ...]
    lowest: int
    full: bool
    images: bool

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
        weighted = [layer for layer in layers if isinstance(layer, Weighted)]
        owned = {n for layer in weighted for n in (layer.weight, layer.bias) if n}
        if not owned or not owned == set(layout.names) == set(layout.trainable):
            return None
        ends = [i for i, one in enumerate(layers, 1) if isinstance(one, IMAGES)] or [0]
        before, after = layers[: ends[-1]], layers[ends[-1] :]
        if any(isinstance(one, Dense | Flat) for one in before):
            return None
        if before and not any(isinstance(one, Flat) for one in after):
            return None
        lowest = layers.index(weighted[0])
        return Chain(layout, model.criterion, tuple(layers), lowest, full, bool(before))

    def thin(self, visits: int) -> bool:
        """See `Stackable`: whether the factors are smaller than the weights they stand for."""
        if self.images or self.layout.dtype not in (torch.float32, torch.float64):
            return False
        widths = sum(sum(shape) for shape in self.layout.shapes if len(shape) > 1)
        return visits * widths < self.layout.size

    def outputs(self, values: Views, x: Tensor) -> Tensor:
        """See `Stackable`."""
        out = self._forward(Point(values), x)[0]
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
        outputs, tape = self._forward(point, x)
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
        return losses, ChainGradient(self.layout, parts)


def _unfold(module: nn.Module) -> list[Layer] | None:
    """The layers of nested `Sequential` modules; None if one is unknown."""
    layers: list[Layer] = []
    for name, one in module.named_modules():
        if type(one) in (nn.Sequential, nn.Identity):
            continue
        layer = _layer(f"{name}." if name else "", one)
        if layer is None or one._forward_hooks or one._forward_pre_hooks:
            return None
        if isinstance(layer, Weighted) and any(isinstance(below, Weighted) for below in layers):
            layer = replace(layer, lowest=False)
        if isinstance(layer, Pooling) and layers and layers[-1] == Pointwise(nn.ReLU):
            layers.insert(-1, layer)  # the largest entry is the same, and there are fewer to cut
            continue
        layers.append(layer)
    for i, (below, layer) in enumerate(pairwise(layers), 1):
        if isinstance(layer, Pointwise) and isinstance(below, Weighted | Pooling):
            layers[i] = replace(layer, fresh=True)
    return layers


def _layer(prefix: str, one: nn.Module) -> Layer | None:
    """A module as a layer of a chain, the lowest one with parameters perhaps."""
    kind: Any = type(one)
    module: Any = one
    if kind in (nn.Linear, nn.Conv2d):
        names = f"{prefix}weight", None if module.bias is None else f"{prefix}bias"
        if kind is nn.Linear:
            return Dense(*names, True)
        if module.padding_mode == "zeros" and not isinstance(module.padding, str):
            shape = module.stride, module.padding, module.dilation
            return Convolution(*names, True, shape, module.groups)
    if kind is nn.MaxPool2d and not module.return_indices:
        pairs = module.kernel_size, module.stride, module.padding, module.dilation
        return Pooling((*map(_pair, pairs), module.ceil_mode))
    if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return Flat()
    return Pointwise(kind) if kind in POINTWISE else None


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
