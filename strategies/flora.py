"""FLoRA."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.core.lora import Adapter, flora
from fedsim.core.lora.rebasing import Rebasing


class FLoRA(Rebasing):
    """FLoRA: clients' adapters are stacked, merged into the base, and begun anew every round.

    Wang et al., *FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations*, NeurIPS 2024: ``A = [p_1 A_1; ...; p_N A_N]``, ``B = [B_1 ... B_N]``, so
    ``B A = sum p_i B_i A_i`` exactly, for any ranks; every client adds it to its base and starts
    a new adapter, A at random and B zero. The weight is on one factor only. Clients of rank r
    send r ranks and are sent all of them, until the base's own shape is smaller.

    Needs ``model = {name = "lora", delta = true}``. A client keeps the dense sum of all updates,
    as large as the adapted layers: simulating n clients takes n times that.

    Args:
        ranks: of the clients: a list, dealt in turn, or a table by device profile. None: the
            model's.
        weighted: weigh clients by their number of examples.

    Raises:
        ConfigError: a rank is below 1.
    """

    def divide(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float]
    ) -> tuple[Adapter | None, Adapter]:
        """Everything goes into the base."""
        return None, flora(adapters, weights)
