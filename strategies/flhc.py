"""FL+HC."""

from __future__ import annotations

from typing import Any

from fedsim.core.hierarchical import HierarchicalStrategy


class FLHC(HierarchicalStrategy):
    """FL+HC: FedAvg, one hierarchical clustering of the updates, then FedAvg in each cluster.

    Briggs, Fan and Andras, *Federated Learning with Hierarchical Clustering of Local Updates to
    Improve Training on Non-IID Data*, IJCNN 2020; from its description, defaults are ours.
    ``Delta_i = local_update(w) - w`` of all clients is clustered (linkage with L1, L2 or cosine
    distance, cut at a distance); every cluster goes on from w by itself.

    Args:
        warmup_rounds: rounds before the clustering.
        cut: ``"distance"`` is the paper's, with its `t`; ours is free of scale.
        options: other options of `HierarchicalStrategy`.
    """

    def __init__(self, warmup_rounds: int = 10, cut: Any = "gap", **options: Any) -> None:
        given = {"signature_epochs": 0, "init": "global", **options}
        super().__init__(warmup_rounds=warmup_rounds, cut=cut, **given)
