"""Per-FedAvg."""

from __future__ import annotations

from typing import Any, Literal

from fedsim.core.errors import one_of, require
from strategies.fedavg import FedAvg

Order = Literal["first", "hessian_free"]


class PerFedAvg(FedAvg):
    """Per-FedAvg: a shared model from which one step of local training leads far.

    Fallah, Mokhtari and Ozdaglar, *Personalized Federated Learning: A Meta-Learning Approach*,
    NeurIPS 2020: ``min_w mean_k F_k(w - alpha grad F_k(w))``, first order (FO) or with
    Hessian-vector products by differences (HF); beta is `train.lr`. The server takes the plain
    mean. Batches D and D' are successive ones, which is our choice. Clients are judged after
    `tuning_epochs` of steps of length `alpha`. With ``alpha = 0`` it is FedAvg.

    Args:
        alpha: length of the adaptation step.
        order: ``"first"`` or ``"hessian_free"``.
        delta: length of the difference of ``"hessian_free"``.
        tuning_epochs: epochs of adaptation before judging.
        server_lr: as in FedAvg.
        weighted: weigh clients by their number of examples; the paper does not.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "perfedavg"

    def __init__(
        self,
        alpha: float = 0.01,
        order: Order = "first",
        delta: float = 1e-3,
        tuning_epochs: int = 1,
        server_lr: float = 1.0,
        weighted: bool = False,
    ) -> None:
        super().__init__(server_lr, weighted)
        one_of("order", order, Order)
        require(alpha >= 0, "alpha", alpha, "0 or above")
        require(delta > 0, "delta", delta, "above 0")
        require(tuning_epochs >= 0, "tuning_epochs", tuning_epochs, "0 or above")
        self.alpha, self.tuning_epochs = float(alpha), tuning_epochs
        self.delta = float(delta) if order == "hessian_free" else 0.0

    def client_config(self) -> dict[str, Any]:
        """Tell the clients the parameters."""
        return {"alpha": self.alpha, "delta": self.delta, "tuning_epochs": self.tuning_epochs}
