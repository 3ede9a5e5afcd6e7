"""FedRep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedsim.core.errors import require
from fedsim.core.personal import Shared
from strategies.fedavg import FedAvg


class FedRep(Shared, FedAvg):
    """FedRep: as FedPer, with the last layer and the shared layers trained in turn.

    Collins et al., *Exploiting Shared Representations for Personalized Federated Learning*, ICML
    2021: a client first trains its head with the received representation fixed, then the
    representation with the head fixed. Before a client is judged, its head is trained once more.

    Args:
        head_epochs: epochs on the head, before the `train.epochs` on the shared layers.
        server_lr: as in FedAvg.
        weighted: as in FedAvg.

    Raises:
        ConfigError: `head_epochs` is below 1 or `server_lr` is not above 0.
    """

    client = "fedrep"

    def __init__(self, head_epochs: int = 1, server_lr: float = 1.0, weighted: bool = True) -> None:
        super().__init__(server_lr, weighted)
        require(head_epochs >= 1, "head_epochs", head_epochs, "1 or above")
        self.head_epochs = head_epochs

    def client_config(self) -> dict[str, Any]:
        """Tell the clients how long to train the head."""
        return {"head_epochs": self.head_epochs}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Ask for so many epochs more."""
        told: Any = {**config, "epochs": int(str(config.get("epochs", 1))) + self.head_epochs}
        return super().configure_train(server_round, arrays, told, grid)
