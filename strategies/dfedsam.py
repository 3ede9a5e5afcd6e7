"""DFedSAM and DFedSAM-MGS."""

from __future__ import annotations

from typing import Any

from fedsim.core.errors import ConfigError
from strategies.dfedavg import DFedAvg


class DFedSAM(DFedAvg):
    """DFedSAM: sharpness-aware local steps and gossip; with several gossip steps, DFedSAM-MGS.

    Shi et al., *Improving the Model Consistency of Decentralized Federated Learning*, ICML 2023
    (arXiv 2302.04083): local SAM steps, then ``X <- W^Q Z``. The paper has no public code and
    only its abstract could be had: the steps follow third-party ports and the authors' later
    code, so the algorithm is reconstructed. ``rho = 0.01`` and ``Q = 4`` for MGS are second-hand.

    On the complete graph with ``rho = 0`` it is FedAvg with uniform weights.

    Args:
        rho: radius of the perturbation; 0 is `DFedAvg`.
        gossip_steps: Q; above 1 it is DFedSAM-MGS.
        options: the other options of `DFedAvg`.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "fedsam"

    def __init__(self, rho: float = 0.01, gossip_steps: int = 1, **options: Any) -> None:
        super().__init__(gossip_steps=gossip_steps, **options)
        if not rho >= 0:
            raise ConfigError(f"rho = {rho} must be 0 or above")
        self.rho = float(rho)

    def client_config(self) -> dict[str, Any]:
        """Tell the clients `rho`."""
        return {"rho": self.rho}


class DFedSAMMGS(DFedSAM):
    """DFedSAM-MGS: `DFedSAM` with four gossip steps a round unless asked otherwise.

    Args:
        rho: radius of the perturbation.
        gossip_steps: Q.
        options: the other options of `DFedAvg`.
    """

    def __init__(self, rho: float = 0.01, gossip_steps: int = 4, **options: Any) -> None:
        super().__init__(rho, gossip_steps, **options)
