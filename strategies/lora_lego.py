"""LoRA-LEGO as a federated strategy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord

from fedsim.core.errors import require
from fedsim.core.lora import Adapter, Factors, Lego, Merged, compacted, lego
from fedsim.core.lora.rebasing import Rebasing, both
from fedsim.core.lora.serving import mean_gap
from fedsim.core.records import FlatRecord
from fedsim.core.strategy import Setting

MODES = ("replace", "merge_and_reinit", "residual")
_WARNING = (
    "lora_lego: every cluster holds the same rank of every client: clients start a round from one "
    "adapter, so LoRA-LEGO is the mean of A and of B (FedIT), %s"
)


class LoRALego(Rebasing):
    """LoRA-LEGO: clients' adapters are clustered rank by rank, and every round goes on from that.

    Zhao et al., *Merging LoRAs like Playing LEGO*, ICLR 2025, is a merger of adapters that were
    trained apart. It has no federated form: these are ours, and the merger itself is
    **reconstructed** (`fedsim.core.lora.Lego`). `mode` says how a round goes on:

    - ``"replace"``: clients replace their adapter by the merged one. A client of a lower rank r is
      sent a clustering into r, not a cut-off of the larger one. **It degenerates.** Clients that
      start a round from one adapter and stay near it have their ranks clustered by index: then
      the result is FedIT's, and parameter reweighting blows it up round by round. Output
      reweighting does the same to clients of a rank below the mean, and starves those above. That
      is why both are off in this mode unless asked for.
    - ``"merge_and_reinit"``: the merged update goes into every client's base, and clients begin
      new adapters of their own, as in FLoRA.
    - ``"residual"``: the merged updates stay a second, frozen adapter, which is sent whole; clients
      train and send a new one, and the base is as it was. `residual_rank` limits its rank.

    The last two need ``model = {name = "lora", delta = true}``. The columns ``lego_degenerate``
    (share of the modules), ``lego_gamma_mean`` and ``lego_gamma_max`` (the factors that
    reweighting would apply) tell what the clustering amounted to. The merger is meant for one
    round of clients who trained apart; `fedsim merge-lora` does that.

    Args:
        ranks: of the clients: a list, dealt in turn, or a table by device profile. None: the
            model's.
        mode: how rounds go on.
        clusters: k for clients of the model's rank; 0 means that rank.
        residual_rank: of the second adapter, which is cut to its largest singular values; 0 means
            that it grows by k every round, up to the layer's own rank.
        parameter_reweight: restore the norm of centres; None: except where clients replace.
        gamma_max: by at most so much; 0 means no limit.
        output_reweight: multiply by ``sqrt(mean rank / k)``; None: except where clients replace.
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
        ranks: list[int] | dict[str, int] | None = None,
        mode: str = "replace",
        clusters: int = 0,
        residual_rank: int = 0,
        parameter_reweight: bool | None = None,
        gamma_max: float = 0.0,
        output_reweight: bool | None = None,
        mass: bool = False,
        feature: str = "raw",
        unit_weight: str = "uniform",
        norm: str = "inf",
        sign_align: bool = False,
        balance: bool = False,
        weighted: bool = True,
    ) -> None:
        super().__init__(ranks, weighted)
        require(mode in MODES, "mode", mode, " or ".join(MODES))
        require(residual_rank >= 0, "residual_rank", residual_rank, "0 or above")
        self.mode, self.clusters, self.residual_rank = mode, clusters, residual_rank
        self.fresh = self.rebases = mode != "replace"
        if parameter_reweight is None:
            parameter_reweight = self.rebases
        if output_reweight is None:
            output_reweight = self.rebases
        self.second: dict[str, Factors] = {}
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

    def told(self, server_round: int, rank: int) -> dict[str, Any]:
        """A second adapter is sent whole, so that nothing stays on the client."""
        told = super().told(server_round, rank)
        return {**told, "carried": self.mode == "merge_and_reinit"}

    def share(self, node: int) -> Any:
        """A second adapter is the same for all."""
        return self.rank_of(node) if self.mode == "residual" else super().share(node)

    def patch_for(self, node: int, record: FlatRecord) -> ArrayRecord | None:
        """The merges a node lacks, or the second adapter."""
        if self.mode != "residual":
            return super().patch_for(node, record)
        return self.patches.alone(self.second, record) if self.second else None

    def merge(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
    ) -> Adapter:
        """Cluster, and say what that amounted to."""
        found = self._lego(adapters, weights, self.clusters or rank)
        share = sum(m.by_rank_index for m in found.values()) / len(found)
        gamma = [g for m in found.values() for g in m.gamma]
        self.facts |= {
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

    def divide(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float]
    ) -> tuple[Adapter | None, Adapter]:
        """Everything goes into the base."""
        return None, self.merge(server_round, adapters, weights, self.rank)

    def onward(
        self,
        server_round: int,
        rest: FlatRecord,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
    ) -> FlatRecord:
        """As the mode says."""
        if self.mode != "residual":
            return super().onward(server_round, rest, adapters, weights)
        _, update = self.divide(server_round, adapters, weights)
        self.facts["mean_gap"] = mean_gap(update, adapters, weights)
        summed = both(self.second, update) if self.second else update
        most = self.residual_rank or None
        self.second = {m: compacted(f, most) for m, f in summed.items()}
        return self.patches.replace(self.with_rest(rest), self.second)

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
        """Also the second adapter, and whether the user was told."""
        second = {m: {"a": f.a, "b": f.b} for m, f in self.second.items()}
        return {**super().state_dict(), "warned": self.warned, "second": second}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.warned = state["warned"]
        self.second = {m: Factors(f["a"], f["b"]) for m, f in state["second"].items()}
