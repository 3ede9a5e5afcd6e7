"""FedSAM."""

from __future__ import annotations

from typing import Any

from fedsim.core.errors import ConfigError
from strategies.fedavg import FedAvg


class FedSAM(FedAvg):
    """FedSAM: FedAvg whose clients take sharpness-aware steps.

    Qu et al., *Generalized Federated Learning via Sharpness Aware Minimization*, ICML 2022:
    the local optimiser of FedAvg is SAM. Written from the published description.

    Args:
        rho: radius of the clients' perturbation; 0 is FedAvg.
        server_lr: step along the mean update.
        weighted: weigh clients by their number of examples.

    Raises:
        ConfigError: `rho` is negative or `server_lr` is not above 0.
    """

    client = "fedsam"

    def __init__(self, rho: float = 0.01, server_lr: float = 1.0, weighted: bool = True) -> None:
        super().__init__(server_lr, weighted)
        if not rho >= 0:
            raise ConfigError(f"rho = {rho} must be 0 or above")
        self.rho = float(rho)

    def client_config(self) -> dict[str, Any]:
        """Tell the clients `rho`."""
        return {"rho": self.rho}
