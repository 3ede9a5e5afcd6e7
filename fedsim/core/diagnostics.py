"""What an aggregation did to the clients' models: numbers for the rounds table."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedsim.core.strategy import Evaluate


def decompose(
    model: ArrayRecord, clients: Mapping[int, ArrayRecord], evaluate: Evaluate
) -> dict[str, float]:
    """The loss of an aggregated model as a sum of three terms.

    Reconstructed: FedLD's abstract names the terms, and this telescoping identity fits the names.
    With w' the aggregated model, w_m the N client models, D_m their data, D the common test set,
    and uniform means over clients::

        L(w'; D) = mean_m L(w_m; D_m)                       "local"
                 + mean_m [L(w_m; D) - L(w_m; D_m)]         "shift"
                 + [L(w'; D) - mean_m L(w_m; D)]            "aggregation"

    It costs 2 N + 1 evaluations.

    Args:
        model: the aggregated model.
        clients: the clients' models by node id, at least one.
        evaluate: mean loss of a model on the test set, or on the data of a node.
    """
    total = evaluate(model, None)
    common = sum(evaluate(w, None) for w in clients.values()) / len(clients)
    local = sum(evaluate(w, node) for node, w in clients.items()) / len(clients)
    return {"local": local, "shift": common - local, "aggregation": total - common}


class Geometry:
    """How an aggregate ``G^T c`` lies to the plain mean of the updates, over all entries."""

    def __init__(self) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64)

    def add(self, K: Tensor, c: Tensor) -> None:
        """Add one entry of the model.

        Args:
            K: Gram matrix of its updates, shape [N, N], float64.
            c: coefficients of its aggregate, shape [N].
        """
        lam = torch.linalg.eigvalsh(K)
        self._sums += torch.stack([c @ K @ c, K.mean(), (c @ K).mean(), lam[-1], lam.sum()]).cpu()

    def figures(self) -> dict[str, float]:
        """The numbers; 1 where there is no update at all.

        Returns:
            ``norm_ratio``: length of the aggregate over that of the mean; ``cosine``: between the
            two; ``top_energy``: share of each entry's first principal direction in the energy of
            the updates, averaged over entries by energy.
        """
        aggregate, mean, inner, top, energy = self._sums.tolist()
        long = aggregate > 0 and mean > 0
        return {
            "norm_ratio": math.sqrt(max(aggregate, 0.0) / mean) if mean > 0 else 1.0,
            "cosine": inner / math.sqrt(aggregate * mean) if long else 1.0,
            "top_energy": top / energy if energy > 0 else 1.0,
        }
