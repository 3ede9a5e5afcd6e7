"""FlexLoRA."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.core.lora import Adapter, flexlora
from fedsim.core.lora.serving import LoRAStrategy


class FlexLoRA(LoRAStrategy):
    """FlexLoRA: every client gets the best approximation, of its rank, of the mean update.

    Bai et al., *Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
    Client Resources*, NeurIPS 2024: with ``sum p_i B_i A_i = U S V^T`` a client of rank r is sent
    ``A = V_r^T`` and ``B = U_r S_r``. The decomposition is computed from the factors. Identical
    clients get back their update, in other factors. The released code never applies the clients'
    ranks; here they are.

    Args:
        ranks: of the clients: a list, dealt in turn, or a table by device profile. None: the
            model's.
        weighted: weigh clients by their number of examples.
    """

    def merge(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
    ) -> Adapter:
        """By singular values."""
        return flexlora(adapters, weights, rank)
