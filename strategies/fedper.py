"""FedPer."""

from __future__ import annotations

from fedsim.core.personal import Shared
from strategies.fedavg import FedAvg


class FedPer(Shared, FedAvg):
    """FedPer: FedAvg of all layers but the last, which stays on the client.

    Arivazhagan et al., *Federated Learning with Personalization Layers*, 2019 (arXiv 1912.00818).
    Each client begins with the initial model's last layer.

    Args:
        server_lr: as in FedAvg.
        weighted: as in FedAvg.

    Raises:
        ConfigError: `server_lr` is not above 0.
    """

    client = "fedper"
