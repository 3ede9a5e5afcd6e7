"""FedProx."""

from __future__ import annotations

from typing import Any

from fedsim.core.errors import require
from strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """FedProx: FedAvg whose clients are held near the received model.

    Li et al., *Federated Optimization in Heterogeneous Networks*, MLSys 2020, Algorithm 2 and
    Eq. 2: each client lowers ``F_k(w) + (mu / 2) ||w - w_t||^2``. The server averages by number of
    examples (the paper samples clients with probability n_k / n and averages uniformly).

    Args:
        mu: weight of the proximal term; 0 is FedAvg.
        server_lr: step along the mean update.
        weighted: weigh clients by their number of examples.

    Raises:
        ConfigError: `mu` is negative or `server_lr` is not above 0.
    """

    client = "fedprox"

    def __init__(self, mu: float = 0.01, server_lr: float = 1.0, weighted: bool = True) -> None:
        super().__init__(server_lr, weighted)
        require(mu >= 0, "mu", mu, "0 or above")
        self.mu = float(mu)

    def client_config(self) -> dict[str, Any]:
        """Tell the clients `mu`."""
        return {"mu": self.mu}
