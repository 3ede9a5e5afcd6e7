"""Simulated time: what a round would take on given devices, computed and never measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fedsim import registry
from fedsim.core.errors import ConfigError
from fedsim.core.model import FlatModel

HOURS = 24.0
Spans = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Device:
    """A kind of client device.

    Attributes:
        flops: sustained floating-point operations per second in training.
        down_mbit: download bandwidth in Mbit/s (10^6 bit/s).
        up_mbit: upload bandwidth in Mbit/s.
        failure_rate: probability that it drops out of a round after it was sent the message.
        online: hours of the day in which it can be asked, as (from, until); empty: always. A span
            may go over midnight.
    """

    flops: float
    down_mbit: float
    up_mbit: float
    failure_rate: float = 0.0
    online: Spans = ()

    def __post_init__(self) -> None:
        for key in ("flops", "down_mbit", "up_mbit"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key} = {getattr(self, key)} must be above 0")
        if not 0 <= self.failure_rate < 1:
            raise ConfigError(f"failure_rate = {self.failure_rate} must be at least 0 and below 1")
        for start, end in self.online:
            if not (0 <= start <= HOURS and 0 <= end <= HOURS and start != end):
                raise ConfigError(
                    f"online = {[list(s) for s in self.online]} must be pairs of different hours "
                    "from 0 to 24, such as [[22, 6]]"
                )


class _Counter(TorchDispatchMode):
    """Adds up the operations of products and convolutions, by torch's own formulas.

    As `FlopCounterMode`, which imports torch's compiler for it: more than a second of every start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let an operator work, in its parts if it has some, and add its operations."""
        given = dict(kwargs or {})
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                out = func.decompose(*args, **given)
            if out is not NotImplemented:
                return out
        out = func(*args, **given)
        if formula is not None:
            self.flops += formula(*args, **given, out_val=out)
        return out


def forward_flops(model: FlatModel, x: Tensor) -> float:
    """Floating-point operations of one forward pass for one example.

    Args:
        model: the model.
        x: inputs of one example, shape [1, ...].
    """
    with _Counter() as counter, model.evaluating(), torch.no_grad():
        model.module(x)  # at the values that the module has, whatever they are
    return float(counter.flops)


def device(name: str, params: dict[str, Any]) -> Device:
    """The device profile of that name, with some of its numbers replaced.

    Raises:
        ConfigError: there is no such profile, or a number is out of range.
    """
    made: Device = registry.resolve("devices", name)(**params)
    return made
