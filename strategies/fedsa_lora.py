"""FedSA-LoRA."""

from __future__ import annotations

from fedsim.core.lora.serving import OneFactor
from strategies.fedavg import FedAvg


class FedSALoRA(OneFactor, FedAvg):
    """FedSA-LoRA: A is averaged; every client keeps a B of its own, which never travels.

    Guo et al., *Selective Aggregation for Low-Rank Adaptation in Federated Learning*, ICLR 2025
    (arXiv 2410.01463), written from the published description: A learns what is common, B what is
    the client's. As the server holds no B, nothing can be judged centrally.

    Args:
        server_lr: as in FedAvg.
        weighted: as in FedAvg.

    Raises:
        ConfigError: `server_lr` is not above 0, or the model has no low-rank updates.
    """

    client = "fedsa_lora"
    stays = "b"
