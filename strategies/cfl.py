"""CFL."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from scipy.cluster.hierarchy import fcluster, linkage

from fedsim.core.clustering import distances
from fedsim.core.clusters import ClusteredStrategy
from fedsim.core.records import as_flat
from fedsim.core.strategy import Setting


class CFL(ClusteredStrategy):
    """CFL: clusters are split in two where their members' updates stop agreeing.

    Sattler, Mueller and Samek, *Clustered Federated Learning*, 2019 (arXiv 1910.01991), after the
    authors' notebook. A cluster c is split iff ``||mean_i dW_i|| < eps1``,
    ``max_i ||dW_i|| > eps2``, ``|c| > 2`` and ``round > patience``; the halves are those of
    complete linkage on cosine distance. Each cluster takes the unweighted mean of its own members;
    halves begin with theirs of the same round. Members are kept by node id (the notebook confuses
    places in the similarity matrix with clients at second splits). The norms are not free of
    scale. Everybody takes part in every round; who misses a split stays in the older half. The
    updates of a round are all in memory. With ``eps1 = 0`` it is FedAvg, unweighted.

    Args:
        eps1: a cluster whose mean update is shorter has converged.
        eps2: a cluster with a longer single update has not for that client.
        patience: rounds before the first split.
        weighted: weigh clients by their number of examples.
    """

    def __init__(
        self, eps1: float = 0.4, eps2: float = 1.6, patience: int = 20, weighted: bool = False
    ) -> None:
        super().__init__(weighted)
        self.eps1, self.eps2, self.patience = float(eps1), float(eps2), patience
        self._records: dict[int, ArrayRecord] = {}

    def setup(self, setting: Setting) -> None:
        """Everybody begins in one cluster."""
        super().setup(setting)
        self.members = dict.fromkeys(range(1, setting.num_clients + 1), 0)

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """The first cluster's model."""
        self.settle(self.members, {0: as_flat(arrays, self.setting.info.layout)})
        return super().start_arrays(arrays)

    def sample(self, server_round: int, nodes: list[int]) -> list[int]:
        """Everybody."""
        return nodes

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """As any clustered strategy, with the models before it and all replies at hand."""
        self._records, self._before = {}, dict(self.heads)
        return super().aggregate_train(server_round, replies)

    def take(
        self, server_round: int, node: int, record: ArrayRecord, reply: Message
    ) -> int | bool | None:
        """To the node's cluster; the reply is remembered."""
        self._records[node] = record
        return self.members.get(node)

    def regroup(self, server_round: int, nodes: list[int]) -> None:
        """Split where it is due."""
        for name in sorted(self.heads):
            inside = [n for n in nodes if self.members.get(n) == name]
            if server_round > self.patience and len(inside) > 2:
                self._split(name, inside)
        self._records = {}

    def _split(self, name: int, inside: list[int]) -> None:
        layout = self.setting.info.layout
        old = self._before.get(name, self.heads[name]).flat[: layout.num_trainable].double()
        updates = np.stack(
            [
                (as_flat(self._records[n], layout).flat[: layout.num_trainable] - old).numpy()
                for n in inside
            ]
        )
        lengths = np.linalg.norm(updates, axis=1)
        if np.linalg.norm(updates.mean(0)) >= self.eps1 or lengths.max() <= self.eps2:
            return
        labels = fcluster(linkage(distances(updates, "cosine"), "complete"), 2, "maxclust")
        half = [n for n, c in zip(inside, labels, strict=True) if c != labels[0]]
        if not half:
            return
        rest = [n for n in inside if n not in half]
        heads = {
            **self.heads,
            name: self.mean_of({n: self._records[n] for n in rest}),
            self.fresh: self.mean_of({n: self._records[n] for n in half}),
        }
        self.settle({**self.members, **dict.fromkeys(half, self.fresh)}, heads)
