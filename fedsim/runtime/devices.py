"""Device profiles: what a client's machine and its network do, as data with sources.

Compute is a fifth of the vendor's peak for 32-bit floats; the fifth is our assumption. Measure your
own model on your own device where seconds matter. Every number can be replaced in the experiment:
``{name = "jetson_tx2", flops = 2e11}``.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.runtime.clock import Device
from fedsim.runtime.clock import Spans as Spans  # the type of an inherited field


@dataclass(frozen=True)
class Workstation(Device):
    """A desktop on a wired network: 100 GFLOP/s sustained, 1 Gbit/s both ways.

    Round numbers of ours, for the order of magnitude.
    """

    flops: float = 1e11
    down_mbit: float = 1000.0
    up_mbit: float = 1000.0


@dataclass(frozen=True)
class Phone(Device):
    """A phone on a mobile network: 10 GFLOP/s sustained, 55 Mbit/s down, 11 Mbit/s up.

    Download: the world's median mobile speed in the Speedtest Global Index of July 2021, 55.07
    Mbit/s; upload a fifth of it, by assumption. Drop-out: 6 to 10 % of the devices of a round
    (Bonawitz et al. 2019, Towards Federated Learning at Scale, section 9). Compute: ours.
    """

    flops: float = 1e10
    down_mbit: float = 55.0
    up_mbit: float = 11.0
    failure_rate: float = 0.08


@dataclass(frozen=True)
class RaspberryPi5(Device):
    """A Raspberry Pi 5 on a home connection: 31 GFLOP/s sustained, 107 Mbit/s down, 53 up.

    Compute: four Cortex-A76 cores at 2.4 GHz (Raspberry Pi's product brief), two 128-bit
    multiply-add units each, 154 GFLOP/s peak. Download: the world's median fixed broadband in the
    Speedtest Global Index of July 2021, 107.50 Mbit/s; upload half of it, by assumption.
    """

    flops: float = 31e9
    down_mbit: float = 107.0
    up_mbit: float = 53.0


@dataclass(frozen=True)
class JetsonTX2(Device):
    """An NVIDIA Jetson TX2 on a laboratory's Wi-Fi: 133 GFLOP/s sustained, 100 Mbit/s both ways.

    Compute: 256 CUDA cores at 1.30 GHz (NVIDIA's data sheet), 666 GFLOP/s peak. Network: ours.
    """

    flops: float = 133e9
    down_mbit: float = 100.0
    up_mbit: float = 100.0


@dataclass(frozen=True)
class JetsonNX(JetsonTX2):
    """An NVIDIA Jetson Xavier NX: 169 GFLOP/s sustained, 100 Mbit/s both ways.

    Compute: 384 CUDA cores at 1.10 GHz (NVIDIA's data sheet), 845 GFLOP/s peak. Network: ours.
    """

    flops: float = 169e9


@dataclass(frozen=True)
class JetsonAGX(JetsonTX2):
    """An NVIDIA Jetson AGX Xavier: 282 GFLOP/s sustained, 100 Mbit/s both ways.

    Compute: 512 CUDA cores at 1.377 GHz (NVIDIA's data sheet), 1.41 TFLOP/s peak. Network: ours.
    """

    flops: float = 282e9
