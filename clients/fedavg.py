"""Client half of FedAvg."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.program import LocalProgram


@dataclass(frozen=True, kw_only=True)
class FedAvg(LocalProgram):
    """Local SGD from the received model (McMahan et al. 2017, Algorithm 1, `ClientUpdate`)."""
