"""APFL."""

from __future__ import annotations

from typing import Any

from fedsim.core.errors import require
from strategies.fedavg import FedAvg


class APFL(FedAvg):
    """APFL: FedAvg, and every client's mixture of the shared model with one of its own.

    Deng, Kamani and Mahdavi, *Adaptive Personalized Federated Learning*, 2020 (arXiv 2003.13461),
    written from memory of the paper: ``v`` follows the gradient at ``alpha v + (1 - alpha) w``.
    `alpha` is fixed here; the paper may also learn it. With ``alpha = 0`` it is FedAvg, to the bit.

    Args:
        alpha: share of the client's own model.
        server_lr: as in FedAvg.
        weighted: as in FedAvg.

    Raises:
        ConfigError: `alpha` is not in [0, 1] or `server_lr` is not above 0.
    """

    client = "apfl"

    def __init__(self, alpha: float = 0.5, server_lr: float = 1.0, weighted: bool = True) -> None:
        super().__init__(server_lr, weighted)
        require(0 <= alpha <= 1, "alpha", alpha, "from 0 to 1")
        self.alpha = float(alpha)

    def client_config(self) -> dict[str, Any]:
        """Tell the clients `alpha`."""
        return {"alpha": self.alpha}
