"""Ditto."""

from __future__ import annotations

from typing import Any

from fedsim.core.errors import require
from strategies.fedavg import FedAvg


class Ditto(FedAvg):
    """Ditto: FedAvg, and beside it every client's own model, held near the shared one.

    Li et al., *Ditto: Fair and Robust Federated Learning Through Personalization*, ICML 2021,
    Algorithm 1; their code: ``lam = 1``, and as many steps on both models. The shared model is
    FedAvg's to the bit. Clients are judged with their own models, which never leave them. With
    ``lam = 0`` these are trained locally only.

    Args:
        lam: pull to the shared model.
        server_lr: as in FedAvg.
        weighted: as in FedAvg.

    Raises:
        ConfigError: `lam` is negative or `server_lr` is not above 0.
    """

    client = "ditto"

    def __init__(self, lam: float = 1.0, server_lr: float = 1.0, weighted: bool = True) -> None:
        super().__init__(server_lr, weighted)
        require(lam >= 0, "lam", lam, "0 or above")
        self.lam = float(lam)

    def client_config(self) -> dict[str, Any]:
        """Tell the clients `lam`."""
        return {"lam": self.lam}
