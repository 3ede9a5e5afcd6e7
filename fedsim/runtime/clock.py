"""Simulated time: what a round would take on given devices, computed and never measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedsim import registry
from fedsim.core.errors import ConfigError
from fedsim.core.model import FlatModel

BACKWARD = 2.0
"""Backward pass in forward passes: one product for the inputs' gradient, one for the weights'."""


@dataclass(frozen=True)
class Device:
    """A kind of client device.

    Attributes:
        flops: sustained floating-point operations per second in training.
        down_mbit: download bandwidth in Mbit/s (10^6 bit/s).
        up_mbit: upload bandwidth in Mbit/s.
    """

    flops: float
    down_mbit: float
    up_mbit: float

    def seconds(self, flops: float, bytes_down: int, bytes_up: int) -> float:
        """Simulated seconds to receive, compute and send."""
        transfer = bytes_down * 8e-6 / self.down_mbit + bytes_up * 8e-6 / self.up_mbit
        return transfer + flops / self.flops


def workstation(flops: float = 1e11, down_mbit: float = 1000.0, up_mbit: float = 1000.0) -> Device:
    """A desktop on a wired network: 100 GFLOP/s sustained, 1 Gbit/s both ways."""
    return Device(flops, down_mbit, up_mbit)


def phone(flops: float = 1e10, down_mbit: float = 50.0, up_mbit: float = 10.0) -> Device:
    """A phone on a mobile network: 10 GFLOP/s sustained, 50 Mbit/s down and 10 Mbit/s up."""
    return Device(flops, down_mbit, up_mbit)


def forward_flops(model: FlatModel, x: Tensor) -> float:
    """Floating-point operations of one forward pass for one example.

    Args:
        model: the model.
        x: inputs of one example, shape [1, ...].
    """
    record = model.initial()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.outputs(record.flat, record.beside, x)
    return float(counter.get_total_flops())


def device(name: str, params: dict[str, float]) -> Device:
    """The device profile of that name, with some of its numbers replaced.

    Raises:
        ConfigError: there is no such profile, or a number is not above 0.
    """
    made: Device = registry.resolve("devices", name)(**params)
    for key, value in asdict(made).items():
        if not value > 0:
            raise ConfigError(f"clock.device.{key} = {value} must be above 0")
    return made
