"""FedIT."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.core.lora import Adapter, fedit
from fedsim.core.lora.serving import LoRAStrategy


class FedIT(LoRAStrategy):
    """FedIT: the clients' A are averaged, and their B, each for itself.

    Zhang et al., *Towards Building the Federated GPT: Federated Instruction Tuning*, ICASSP 2024
    (arXiv 2305.05644): FedAvg of adapters, ``A = sum p_i A_i`` and ``B = sum p_i B_i``. The
    product is not the mean of the clients' updates: cross terms ``p_i p_j B_i A_j`` remain.

    Args:
        weighted: weigh clients by their number of examples.
    """

    def __init__(self, weighted: bool = True) -> None:
        super().__init__(None, weighted)

    def merge(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
    ) -> Adapter:
        """The two means."""
        return fedit(adapters, weights)
