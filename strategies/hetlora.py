"""HetLoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import MetricRecord

from fedsim.core.errors import require
from fedsim.core.lora import Adapter, hetlora
from fedsim.core.lora.serving import LoRAStrategy
from fedsim.core.nodes import client_at


class HetLoRA(LoRAStrategy):
    """HetLoRA: zero-padded means weighted by the updates' norms; clients prune their own rank.

    Cho et al., *Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models*,
    EMNLP 2024, **reconstructed** from a third-party description: per module ``A = sum w_i A_i``,
    ``B = sum w_i B_i`` over factors padded with zeros, ``w_i = |B_i A_i|_F / sum_j |B_j A_j|_F``;
    a client of rank r is sent the first r ranks. Its loss has the penalty
    ``penalty * |B[:, g:]|_F |A[g:]|_F`` with g = floor(gamma r), summed over modules; if that sum
    shrank in local training its rank is g from now on. That one number gamma is both the tail and
    the factor of pruning is second-hand. ``gamma = 1`` prunes nothing.

    Args:
        ranks: of the clients at first: a list, dealt in turn, or a table by device profile. None:
            the model's.
        gamma: share of the ranks before the tail, in (0, 1].
        penalty: the paper's lambda.

    Raises:
        ConfigError: `gamma` or `penalty` is out of range.
    """

    client = "hetlora"

    def __init__(
        self,
        ranks: list[int] | dict[str, int] | None = None,
        gamma: float = 0.99,
        penalty: float = 0.001,
    ) -> None:
        super().__init__(ranks, weighted=True)
        require(0 < gamma <= 1, "gamma", gamma, "above 0 and at most 1")
        require(penalty >= 0, "penalty", penalty, "0 or above")
        self.gamma, self.penalty = float(gamma), float(penalty)
        self.pruned: dict[int, int] = {}

    def rank_of(self, node: int) -> int:
        """What is left of the rank it began with."""
        return self.pruned.get(node, super().rank_of(node))

    def told(self, server_round: int, rank: int) -> dict[str, Any]:
        """The rank, and how it may shrink."""
        return {"rank": rank, "gamma": self.gamma, "penalty": self.penalty}

    def heard(self, reported: Mapping[int, MetricRecord]) -> None:
        """Take over the ranks that clients cut themselves down to; a rank never grows."""
        for node, metrics in reported.items():
            left = metrics.get("rank")
            if isinstance(left, (int, float)) and 1 <= left < self.rank_of(node):
                self.pruned[node] = int(left)
        nodes = [self.rank_of(n) for n in reported]
        self.facts["rank_mean"] = sum(nodes) / len(nodes)

    def merge(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
    ) -> Adapter:
        """Weighted by norm alone, as in the paper."""
        return hetlora(adapters, None, rank)

    def artefacts(self) -> dict[str, Any]:
        """The ranks that clients have been cut down to, by client number."""
        return {"hetlora": {str(client_at(n)): r for n, r in sorted(self.pruned.items())}}

    def state_dict(self) -> dict[str, Any]:
        """The ranks that are left."""
        pruned = {str(n): r for n, r in sorted(self.pruned.items())}
        return {**super().state_dict(), "pruned": pruned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.pruned = {int(n): r for n, r in state["pruned"].items()}
