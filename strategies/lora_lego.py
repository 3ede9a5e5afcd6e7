"""LoRA-LEGO as a federated strategy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedsim.core.lora import Adapter, Lego, Merged, lego
from fedsim.core.lora.serving import LoRAStrategy
from fedsim.core.records import FlatRecord
from fedsim.core.strategy import Setting

_WARNING = (
    "lora_lego: every cluster holds the same rank of every client: clients start a round from one "
    "adapter, so LoRA-LEGO is the mean of A and of B (FedIT), %s"
)


class LoRALego(LoRAStrategy):
    """LoRA-LEGO: clients' adapters are clustered rank by rank; every round goes on from the result.

    Zhao et al., *Merging LoRAs like Playing LEGO*, ICLR 2025, is a merger of adapters that were
    trained apart. It has no federated form: this one, in which clients replace their adapter by
    the merged one, is ours, and the merger itself is **reconstructed** (`fedsim.core.lora.Lego`).
    A client of a lower rank r is sent a clustering into r, not a cut-off of the larger one.

    **It degenerates here.** Clients that start a round from one adapter and stay near it have
    their ranks clustered by index: then the result is FedIT's, and parameter reweighting blows it
    up round by round. That is why it is off unless asked for, and why the columns
    ``lego_degenerate`` (share of the modules), ``lego_gamma_mean`` and ``lego_gamma_max`` (the
    factors that reweighting would apply) are in the results. The merger is meant for one round of
    clients who trained apart; `fedsim merge-lora` does that.

    Args:
        ranks: of the clients, in turn; None: the model's.
        clusters: k for clients of the model's rank; 0 means that rank.
        parameter_reweight: restore the norm of centres.
        gamma_max: by at most so much; 0 means no limit.
        output_reweight: multiply by ``sqrt(mean rank / k)``.
        mass: the mean-consistent variant.
        feature: what is clustered, ``"raw"`` or ``"unit"``.
        unit_weight: ``"uniform"``, ``"client"`` or ``"client_per_rank"``.
        norm: of the reweighting, ``"inf"`` or ``"l2"``.
        sign_align: cluster up to sign.
        balance: scale both halves of a rank to one norm first.
        weighted: weigh clients by their number of examples, where weights are used.

    Raises:
        ConfigError: an option is not allowed.
    """

    def __init__(
        self,
        ranks: list[int] | None = None,
        clusters: int = 0,
        parameter_reweight: bool = False,
        gamma_max: float = 0.0,
        output_reweight: bool = True,
        mass: bool = False,
        feature: str = "raw",
        unit_weight: str = "uniform",
        norm: str = "inf",
        sign_align: bool = False,
        balance: bool = False,
        weighted: bool = True,
    ) -> None:
        super().__init__(ranks, weighted)
        self.clusters = clusters
        self.options = Lego(
            rank=clusters or "max",
            parameter_reweight=parameter_reweight,
            gamma_max=gamma_max,
            output_reweight=output_reweight,
            mass=mass,
            feature=feature,
            unit_weight=unit_weight,
            norm=norm,
            sign_align=sign_align,
            balance=balance,
            order="member",
            allow_pad=True,
        )
        self.warned = False

    def setup(self, setting: Setting) -> None:
        """k-means draws from the run's seed."""
        super().setup(setting)
        self.options = replace(self.options, seed=setting.seed)

    def merge(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
    ) -> Adapter:
        """Cluster, and say what that amounted to."""
        found = self._lego(adapters, weights, min(self.clusters or rank, rank))
        share = sum(m.by_rank_index for m in found.values()) / len(found)
        gamma = [g for m in found.values() for g in m.gamma]
        self.facts = {
            "lego_degenerate": share,
            "lego_gamma_mean": sum(gamma) / len(gamma),
            "lego_gamma_max": max(gamma),
        }
        if share == 1 and not self.warned:
            blown = self.options.parameter_reweight
            more = "blown up by its parameter reweighting" if blown else "no more"
            logging.getLogger("flwr").warning(_WARNING, more)
            self.warned = True
        return {name: m.factors for name, m in found.items()}

    def shrunk(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float],
        rank: int, merged: FlatRecord,
    ) -> Adapter:  # fmt: skip
        """Clustered anew, into the rank of these clients."""
        return {n: m.factors for n, m in self._lego(adapters, weights, rank).items()}

    def _lego(
        self, adapters: Sequence[Adapter], weights: Sequence[float], k: int
    ) -> dict[str, Merged]:
        return lego(adapters, replace(self.options, rank=k), weights)

    def state_dict(self) -> dict[str, Any]:
        """Also whether the user was told."""
        return {**super().state_dict(), "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        super().load_state_dict(state)
        self.warned = state["warned"]
