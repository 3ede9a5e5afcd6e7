"""pFedMe."""

from __future__ import annotations

from typing import Any

from fedsim.core.errors import require
from strategies.fedavg import FedAvg


class PFedMe(FedAvg):
    """pFedMe: personalisation by Moreau envelopes.

    Dinh, Tran and Nguyen, *Personalized Federated Learning with Moreau Envelopes*, NeurIPS 2020
    (arXiv 2006.08848), written from memory of the paper: clients minimise
    ``min_theta F_k(theta) + (lam / 2) ||theta - w||^2`` over w; the server takes
    ``w <- (1 - beta) w + beta mean(w_k)`` with beta = `server_lr`. Clients are judged with theta.
    Both step lengths times `lam` must stay below 1.

    Args:
        lam: stiffness; the larger, the nearer theta stays to w.
        inner_steps: gradient steps in which theta is found for each batch.
        inner_lr: their length; 0: as `train.lr`.
        server_lr: beta.
        weighted: weigh clients by their number of examples; the paper does not.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "pfedme"

    def __init__(
        self,
        lam: float = 15.0,
        inner_steps: int = 5,
        inner_lr: float = 0.0,
        server_lr: float = 1.0,
        weighted: bool = False,
    ) -> None:
        super().__init__(server_lr, weighted)
        require(lam > 0, "lam", lam, "above 0")
        require(inner_steps >= 1, "inner_steps", inner_steps, "1 or above")
        require(inner_lr >= 0, "inner_lr", inner_lr, "0 or above")
        self.lam, self.inner_steps, self.inner_lr = float(lam), inner_steps, float(inner_lr)

    def client_config(self) -> dict[str, Any]:
        """Tell the clients the parameters."""
        return {"lam": self.lam, "inner_steps": self.inner_steps, "inner_lr": self.inner_lr}
