"""FedAP: warm up together, cluster once, then meta-learn inside the clusters."""

from __future__ import annotations

from typing import Any, Literal

from fedsim.core.averaging import server_step
from fedsim.core.errors import one_of, require
from fedsim.core.hierarchical import HierarchicalStrategy
from fedsim.core.records import FlatRecord, as_flat

Inner = Literal["reptile", "fomaml", "fedavg"]
BatchNorm = Literal["average", "server_frozen"]
Schedule = Literal["stage", "official"]
STAGE_TWO = 1280
"""Rounds of the second stage in the authors' configuration, which scale their schedule."""


class FedAP(HierarchicalStrategy):
    """FedAP: adaptive hierarchical clustering, then meta-learning inside the clusters.

    Yeganeh et al., *Adaptive Personalization in Federated Learning for Highly Non-i.i.d. Data*,
    2022 (arXiv 2207.03448). Verified is the abstract; the mechanics are those of the authors'
    public code. (Another method of this name weighs clients by BatchNorm similarity.)

    1. `warmup_rounds` rounds of FedAvg give w.
    2. All clients train `signature_epochs` epochs from w. Their updates are clustered
       agglomeratively (`fedsim.core.clustering`); the number of clusters follows from the cut.
       Cluster c starts from the weighted mean of its members' models.
    3. In each cluster by itself, from then on:
       ``phi_c <- phi_c + eps_r * (sum_i (n_i / n) w_i - phi_c)``, Reptile with
       ``eps_r = (1 - f) meta_step + f meta_step_end``, f = r / rounds left. A step of 1 is FedAvg.
    4. Before a client is judged it trains `personal_epochs` epochs on a copy of its cluster's
       model.

    Where the authors' code errs, the default is what is sound and an option brings theirs back
    (`FedAPOfficial` sets them all): BatchNorm statistics and counters in the distance
    (``signature="state_dict"``), distances that grow with a client's number of steps
    (``unit=False``), an absolute threshold (``cut="distance"``), server models with
    the statistics they began with (``bn="server_frozen"``), a meta step that overshoots its end
    (``schedule="official"``). Theirs raises where a cluster is smaller than `clients_per_cluster`
    and stops where a client is missing at the clustering; here the first sends to all members, and
    the second makes late joiners. Re-clustering, joiners and merging are additions of ours.

    Args:
        inner: ``"reptile"``; ``"fomaml"``: as Reptile with the last local step instead of the whole
            update (first-order MAML); ``"fedavg"``: the mean.
        meta_step: eps at first.
        meta_step_end: eps at the end.
        personal_epochs: local epochs before judging; 0: none.
        bn: BatchNorm statistics are the members' ``"average"`` or ``"server_frozen"``.
        schedule: eps over the rounds of the ``"stage"``, or over 1280 counted from the start
            (``"official"``).
        options: those of `HierarchicalStrategy`, above all `warmup_rounds`, `signature` and `cut`.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "fedap"

    def __init__(
        self,
        inner: Inner = "reptile",
        meta_step: float = 1.0,
        meta_step_end: float = 0.46,
        personal_epochs: int = 7,
        bn: BatchNorm = "average",
        schedule: Schedule = "stage",
        **options: Any,
    ) -> None:
        super().__init__(**{"unit": True, **options})
        one_of("inner", inner, Inner)
        one_of("bn", bn, BatchNorm)
        one_of("schedule", schedule, Schedule)
        self.inner, self.meta_step, self.meta_step_end = inner, meta_step, meta_step_end
        self.personal_epochs, self.bn, self.schedule = personal_epochs, bn, schedule
        for name in ("meta_step", "meta_step_end", "personal_epochs"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or above")

    def client_config(self) -> dict[str, Any]:
        """Tell the clients how long to personalise."""
        return {"personal_epochs": self.personal_epochs}

    def told(self, node: int, server_round: int) -> dict[str, Any]:
        """Only the last step for FOMAML inside a cluster."""
        last = self.inner == "fomaml" and node in self.members and not self.due(server_round)
        return {**super().told(node, server_round), "last_step": last}

    def blend(self, server_round: int, old: FlatRecord, mean: FlatRecord) -> FlatRecord:
        """Reptile's step towards the mean."""
        eps = 1.0 if self.inner == "fedavg" else self.step_size(server_round)
        new = as_flat(server_step(old, mean, eps), mean.layout)
        if self.bn == "average":
            return new
        flat = old.flat.clone()
        flat[: new.layout.num_trainable] = new.flat[: new.layout.num_trainable]
        return old.with_flat(flat)

    def step_size(self, server_round: int) -> float:
        """The annealed meta step of a round."""
        if self.schedule == "official":
            done, whole = server_round - 1, STAGE_TWO
        else:
            first = self.warmup_rounds + 2
            done, whole = server_round - first, max(self.setting.rounds - first + 1, 1)
        share = done / whole
        return (1 - share) * self.meta_step + share * self.meta_step_end


class FedAPOfficial(FedAP):
    """FedAP as the authors' code runs it on HAM10k (branch `paper_handin`).

    Signatures of the whole state_dict, Ward's method cut at the absolute distance 5, five clients
    a cluster, BatchNorm statistics of the server as they began, their schedule.

    Args:
        options: those of `FedAP`; they take precedence.
    """

    def __init__(self, **options: Any) -> None:
        official: dict[str, Any] = {
            "warmup_rounds": 40,
            "signature": "state_dict",
            "unit": False,
            "cut": "distance",
            "t": 5.0,
            "clients_per_cluster": 5,
            "bn": "server_frozen",
            "schedule": "official",
        }
        super().__init__(**{**official, **options})
