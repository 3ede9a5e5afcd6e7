"""Models of images and of plain numbers: stacks of torch's own layers, nothing hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from fedsim.core.errors import ConfigError
from fedsim.core.text import shown
from fedsim.data.federated import FederatedData


def logistic(data: FederatedData) -> nn.Sequential:
    """One linear layer on the flattened input: logistic or linear regression."""
    return mlp(data, hidden=[])


def mlp(data: FederatedData, hidden: Sequence[int] = (64,)) -> nn.Sequential:
    """Linear layers with ReLU between them, on the flattened input.

    Args:
        data: gives input and output sizes.
        hidden: widths of the hidden layers.
    """
    _numbers("mlp" if hidden else "logistic", data)
    if any(width < 1 for width in hidden):
        raise _refused("hidden", hidden, "widths of 1 or more")
    return nn.Sequential(*_dense([math.prod(data.input_shape), *hidden, data.num_outputs]))


def cnn(
    data: FederatedData,
    channels: Sequence[int] = (32, 64),
    kernel: int = 5,
    padding: int | None = None,
    hidden: Sequence[int] = (512,),
) -> nn.Sequential:
    """Convolution, ReLU, 2x2 max-pooling for each entry of `channels`, then linear layers.

    The defaults are the network of McMahan et al. 2017 for MNIST: 1,663,370 parameters on
    1x28x28 and 10 classes. LEAF's for FEMNIST has ``hidden = [2048]``. A small one, for many
    clients: ``kernel = 3, padding = 0, hidden = [64]``.

    Args:
        data: images [C, H, W]; gives input and output sizes.
        channels: of each convolution.
        kernel: edge of the convolutions in pixels.
        padding: of the convolutions in pixels; None: ``kernel // 2``, which keeps the size if
            `kernel` is odd.
        hidden: widths of the hidden linear layers.
    """
    _numbers("cnn", data)
    if len(data.input_shape) != 3:
        raise ConfigError(
            f"model = 'cnn' needs images [C, H, W]; dataset {data.name} has x of shape "
            f"{data.input_shape}; choose mlp or logistic"
        )
    padding = kernel // 2 if padding is None else padding
    for name, value in (("channels", channels), ("kernel", [kernel]), ("hidden", hidden)):
        if any(v < 1 for v in value):
            raise _refused(name, value, "numbers of 1 or more")
    if not 0 <= padding < kernel:
        raise _refused("padding", padding, f"0 to {kernel - 1}")
    inner, height, width = data.input_shape
    layers: list[nn.Module] = []
    for outer in channels:
        layers += [nn.Conv2d(inner, outer, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
        inner = outer
        height, width = ((edge + 2 * padding - kernel + 1) // 2 for edge in (height, width))
        if min(height, width) < 1:
            raise _refused(
                "channels", channels, f"fewer convolutions: {data.input_shape[1:]} shrinks to none"
            )
    dense = _dense([inner * height * width, *hidden, data.num_outputs])
    return nn.Sequential(*layers, *dense)


def _dense(widths: Sequence[int]) -> list[nn.Module]:
    """Flatten, then linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return layers[:-1]


def _numbers(model: str, data: FederatedData) -> None:
    if data.criterion == "next_token":
        raise ConfigError(
            f"model = {model!r} needs images or numbers; dataset {data.name} is text; choose "
            "char_lstm or char_gpt"
        )


def _refused(parameter: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"model.{parameter} = {shown(value)} is not possible; allowed: {allowed}")
