"""RoLoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedsim.core.lora import Adapter, Factors, rolora, trained_factor
from fedsim.core.lora.serving import LoRAStrategy


class RoLoRA(LoRAStrategy):
    """RoLoRA: in odd rounds clients train B with A frozen, in even rounds A with B frozen.

    Chen et al., *Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA* (arXiv
    2502.01755), after an audit of its supplement; that A is frozen first is second-hand. With one
    factor common to all, the mean of the other gives the mean of the updates, exactly. Rounds
    decide whose turn it is, not a step counter as in the supplement. Here the frozen factor
    travels too, so that clients may miss rounds: bytes are twice the paper's.

    Args:
        weighted: weigh clients by their number of examples.
    """

    client = "rolora"

    def __init__(self, weighted: bool = True) -> None:
        super().__init__(None, weighted)

    def told(self, server_round: int, rank: int) -> dict[str, Any]:
        """Which factor is trained."""
        return {"trains": trained_factor(server_round)}

    def merge(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
    ) -> Adapter:
        """The mean of the factor that was trained, and the frozen one."""
        assert self.sent is not None, "call configure_train() first"
        base, b = self.adapter_of(self.sent, rank), trained_factor(server_round) == "b"
        # Whatever a client sends as the frozen factor, it is the server's.
        shared = [
            {m: Factors(base[m].a if b else f.a, f.b if b else base[m].b) for m, f in own.items()}
            for own in adapters
        ]
        return rolora(shared, weights, server_round)
