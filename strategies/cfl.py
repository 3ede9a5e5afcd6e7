"""CFL."""

from __future__ import annotations

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from fedsim.core.bipartition import BipartitionStrategy
from fedsim.core.clustering import distances
from fedsim.core.errors import require


class CFL(BipartitionStrategy):
    """CFL: clusters are split in two where their members' updates stop agreeing.

    Sattler, Mueller and Samek, *Clustered Federated Learning*, 2019 (arXiv 1910.01991), after the
    authors' notebook. A cluster c is split iff ``||mean_i dW_i|| < eps1``,
    ``max_i ||dW_i|| > eps2``, ``|c| > 2`` and ``round > patience``; the halves are those of
    complete linkage on cosine distance. Each cluster takes the unweighted mean of its own members.
    Members are kept by node id (the notebook confuses places in the similarity matrix with clients
    at second splits). The norms are not free of scale. Late clients descend the tree of splits
    (`BipartitionStrategy`). With
    ``eps1 = 0`` it is FedAvg, unweighted.

    Args:
        eps1: a cluster whose mean update is shorter has converged.
        eps2: a cluster with a longer single update has not for that client.
        patience: rounds before the first split.
        weighted: weigh clients by their number of examples.

    Raises:
        ConfigError: a parameter is negative.
    """

    def __init__(
        self, eps1: float = 0.4, eps2: float = 1.6, patience: int = 20, weighted: bool = False
    ) -> None:
        super().__init__(weighted)
        for name, value in (("eps1", eps1), ("eps2", eps2), ("patience", patience)):
            require(value >= 0, name, value, "0 or above")
        self.eps1, self.eps2, self.patience = float(eps1), float(eps2), patience

    def halves(self, server_round: int, updates: Tensor) -> Tensor | None:
        """The halves of a cluster that has converged, but not for every member."""
        if server_round <= self.patience or len(updates) <= 2:
            return None
        if updates.mean(0).norm() >= self.eps1 or updates.norm(dim=1).max() <= self.eps2:
            return None
        tree = linkage(distances(updates.numpy(), "cosine"), "complete")
        labels = torch.from_numpy(fcluster(tree, 2, "maxclust"))
        return labels != labels[0]
