"""RoLoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import RecordDict
from torch import Tensor

from fedsim.core.lora import Adapter, rolora, trained_factor
from fedsim.core.lora.serving import LoRAStrategy
from fedsim.core.records import Layout, from_record


class RoLoRA(LoRAStrategy):
    """RoLoRA: in odd rounds clients train B with A frozen, in even rounds A with B frozen.

    Chen et al., *Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA* (arXiv
    2502.01755), after an audit of its supplement; that A is frozen first is second-hand. With one
    factor common to all, the mean of the other gives the mean of the updates, exactly. Rounds
    decide whose turn it is, not a step counter as in the supplement. Only the factor that was
    trained goes back. Both are sent out, so that clients may miss rounds.

    Args:
        weighted: weigh clients by their number of examples.
    """

    client = "rolora"

    def __init__(self, weighted: bool = True) -> None:
        super().__init__(None, weighted)

    def told(self, server_round: int, rank: int) -> dict[str, Any]:
        """Which factor is trained."""
        return {"trains": trained_factor(server_round)}

    def answer(self, sent: RecordDict) -> Layout:
        """All but the frozen factor."""
        whole = super().answer(sent)
        frozen = self._frozen(str(sent.config_records["config"]["trains"]))
        return whole.restrict(frozenset(whole.names) - frozen)

    def _frozen(self, trains: str) -> frozenset[str]:
        return frozenset(pair["ba".index(trains)] for pair in self.modules.values())

    def state_of(self, node: int, content: RecordDict) -> Mapping[str, Tensor]:
        """The factor that was trained, and the server's frozen one."""
        assert self.sent is not None, "call configure_train() first"
        return from_record(self.sent) | dict(super().state_of(node, content))

    def merge(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
    ) -> Adapter:
        """The mean of the factor that was trained, and the frozen one."""
        return rolora(adapters, weights, server_round)
