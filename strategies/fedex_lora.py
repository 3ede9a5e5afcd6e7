"""FedEx-LoRA."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.core.lora import Adapter, fedex
from fedsim.core.lora.rebasing import Rebasing


class FedExLoRA(Rebasing):
    """FedEx-LoRA: A and B are averaged as in FedIT, and what that misses goes into the base.

    Singhal et al., *FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
    Foundation Models*, ACL 2025: clients load the means A and B and add
    ``sum p_i B_i A_i - B A = sum p_i (B_i - B)(A_i - A)`` to their base, so that the whole update
    is the exact mean. The residual is sent in factors of rank (N - 1) r, or densely where that
    is smaller. Ranks must be equal. The released code adds it transposed to `nn.Linear` layers;
    here it has the shape of the weight.

    Needs ``model = {name = "lora", delta = true}``; what clients keep is as in FLoRA.

    Args:
        weighted: weigh clients by their number of examples; the paper weighs all alike.
    """

    fresh = False

    def __init__(self, weighted: bool = False) -> None:
        super().__init__(None, weighted)

    def divide(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float]
    ) -> tuple[Adapter | None, Adapter]:
        """The means, and the residual."""
        return fedex(adapters, weights)
