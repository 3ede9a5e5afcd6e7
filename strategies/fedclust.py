"""FedClust."""

from __future__ import annotations

from typing import Any

from fedsim.core.hierarchical import HierarchicalStrategy


class FedClust(HierarchicalStrategy):
    """FedClust: cluster at once, by the weights of the last layer, then FedAvg in each cluster.

    Islam et al., *FedClust*, 2024 (arXiv 2407.07124); from its abstract and description, without
    code: in the first round every client trains from the initial model; clusters are cut from the
    tree of Euclidean distances of the last layers; newcomers go to the nearest. Their threshold
    is not known; the scale-free default is ours. Whole models are sent, since clusters begin at
    their members' mean (``init = "members"``).

    Args:
        signature_epochs: local epochs of the first round.
        cut: ``"distance"`` is the paper's, with its `t`.
        options: other options of `HierarchicalStrategy`.
    """

    def __init__(self, signature_epochs: int = 3, cut: Any = "gap", **options: Any) -> None:
        given = {"signature": "last_layer", "warmup_rounds": 0, **options}
        super().__init__(signature_epochs=signature_epochs, cut=cut, **given)
