"""Which client is in which cluster: columns of the tables, and what the report needs besides."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedsim.core.nodes import node_of
from fedsim.core.strategy import Strategy
from fedsim.data import FederatedData

CLIENTS = "clients"
"""Name of the artefact that says of every client cluster, planted group and labels."""


def clusters(strategy: Strategy, data: FederatedData) -> list[int | None]:
    """Cluster of every client; None where it is in none."""
    if type(strategy).cluster_of is Strategy.cluster_of:
        return [None] * data.num_clients
    return [strategy.cluster_of(node_of(c)) for c in range(data.num_clients)]


def columns(found: list[int | None], data: FederatedData) -> dict[str, Any]:
    """Columns of the rounds table: number of clusters, and agreement with planted groups.

    Clients without a cluster count for neither.
    """
    inside = [c for c, name in enumerate(found) if name is not None]
    if not inside:
        return {}
    labels = [found[c] for c in inside]
    row: dict[str, Any] = {"clusters": len(set(labels))}
    if data.groups is not None:
        from fedsim.core.clustering import agreement  # SciPy's clustering is slow to import

        row["cluster_ari"], row["cluster_nmi"] = agreement(labels, data.groups[inside])
    return row


def artefacts(strategy: Strategy, data: FederatedData) -> dict[str, Any]:
    """The strategy's own artefacts; with clusters, also what is known of every client."""
    own, found = strategy.artefacts(), clusters(strategy, data)
    if all(name is None for name in found):
        return own
    facts: dict[str, Any] = {"cluster": found}
    if data.groups is not None:
        facts["group"] = data.groups.tolist()
    labels = data.fields["y"]
    if data.criterion == "cross_entropy" and labels.dim() == 1:
        facts["labels"] = [
            np.bincount(labels[rows].numpy(), minlength=data.num_outputs).tolist()
            for rows in (data.train[c] for c in range(data.num_clients))
        ]
    return {**own, CLIENTS: facts}
