"""Layers of images at the front of a model, run client by client.

Convolutions gain nothing from a stack of clients. What costs time beside them is Python, which runs
one thread at a time: so a client's layers are differentiated by one call of autograd, and all that
comes after them is done for many clients at once (`fedsim.runtime.chain`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim.runtime.factors import Views, Whole

ImageLayer = Callable[[Tensor, Views], Tensor]
"""Gives the outputs for images [B, channels, height, width] and one client's parameters."""


@dataclass(frozen=True)
class Convolution:
    """A Conv2d layer.

    Attributes:
        weight: name of the weight.
        bias: name of the bias, if there is one.
        shape: stride, padding and dilation.
        groups: into which channels are split.
    """

    weight: str
    bias: str | None
    shape: tuple[Any, Any, Any]
    groups: int

    def __call__(self, x: Tensor, own: Views) -> Tensor:
        bias = own[self.bias] if self.bias else None
        return torch.conv2d(x, own[self.weight], bias, *self.shape, self.groups)


@dataclass(frozen=True)
class Pooling:
    """A MaxPool2d layer.

    Attributes:
        shape: kernel, stride, padding, dilation, and whether sizes are rounded up.
    """

    shape: tuple[Any, ...]

    def __call__(self, x: Tensor, own: Views) -> Tensor:
        return torch.max_pool2d(x, *self.shape)


class Seen(NamedTuple):
    """One client's forward pass: its outputs [B, features], and what they depend on."""

    outputs: Tensor
    leaves: list[Tensor]


class Images:
    """Layers of images in a row; in the end one axis for all axes of an example.

    Args:
        layers: what is run, the first one first.
        axes: for each of their parameters by name, how many axes one client's has.
    """

    def __init__(self, layers: Sequence[ImageLayer], axes: Mapping[str, int]) -> None:
        self._layers, self._axes = tuple(layers), dict(axes)

    def _own(self, values: Views, client: int) -> dict[str, Tensor]:
        """A client's parameters, of stacked ones or of those that all share."""
        found = {n: values[n] for n in self._axes}
        return {n: v[client] if v.dim() > self._axes[n] else v for n, v in found.items()}

    def _run(self, x: Tensor, own: Views) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self._layers:
            x = layer(x, own)
        return x.flatten(1)

    def outputs(self, values: Views, x: Tensor) -> Tensor:
        """What the layers give for images [C, B, channels, height, width]: [C, B, features]."""
        return _stack([self._run(one, self._own(values, i)) for i, one in enumerate(x)])

    def forward(self, values: Views, x: Tensor) -> tuple[Tensor, list[Seen]]:
        """The same, and what `backward` needs."""
        seen = []
        for i, one in enumerate(x):
            own = {n: v.detach().requires_grad_() for n, v in self._own(values, i).items()}
            with torch.enable_grad():
                seen.append(Seen(self._run(one, own), list(own.values())))
        return _stack([one.outputs.detach() for one in seen]), seen

    def backward(self, slope: Tensor, seen: Sequence[Seen]) -> list[Whole]:
        """The gradient of the parameters, from the slope of the outputs."""
        if not self._axes:
            return []
        found = [torch.autograd.grad(*one, own) for one, own in zip(seen, slope, strict=True)]
        return [
            Whole(n, _stack(g)) for n, g in zip(self._axes, zip(*found, strict=True), strict=True)
        ]


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Stacked on a new first axis, one tensor as it is."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))
