"""Gossip: every node's model becomes a weighted sum of its neighbours' models.

One routine for whoever mixes, the server for all nodes at once or a node for itself: terms in
ascending order of nodes, float64 sums, rounded to the models' dtype after every step. So it gives
the same bits wherever it runs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Weights = NDArray[np.float64]


def combine(models: Tensor, weights: Tensor) -> Tensor:
    """``sum_k weights[k] models[k]``: one node's step.

    Args:
        models: the node's and its neighbours' models in ascending order of nodes, shape [k, d].
        weights: of each, float64 [k].
    """
    total = torch.zeros(models.shape[1:], dtype=torch.float64, device=models.device)
    for model, weight in zip(models, weights.double().tolist(), strict=True):
        total += model.double() * weight
    return total.to(models.dtype)


def neighbours(weights: Weights, node: int) -> NDArray[np.int64]:
    """The nodes whose models enter the node's, itself among them, ascending."""
    return np.flatnonzero(weights[node])


def mix(models: Tensor, weights: Weights, steps: int = 1) -> Tensor:
    """``W^steps X``: all nodes' steps at once.

    Nodes with the same row of weights (all of them, on the complete graph) are computed once.

    Args:
        models: X, one node a row, shape [m, d].
        weights: W, shape [m, m].
        steps: gossip steps.
    """
    rows, inverse = np.unique(weights, axis=0, return_inverse=True)
    width = int((rows != 0).sum(1).max())
    who = np.zeros((len(rows), width), np.int64)
    how = np.zeros((len(rows), width))
    for number, row in enumerate(rows):
        found = np.flatnonzero(row)
        who[number, : len(found)], how[number, : len(found)] = found, row[found]
    columns = torch.from_numpy(who).to(models.device)
    terms = torch.from_numpy(how).to(models.device)
    back = torch.from_numpy(inverse.reshape(-1)).to(models.device)
    for _ in range(steps):
        total = torch.zeros(len(rows), models.shape[1], dtype=torch.float64, device=models.device)
        for place in range(width):  # padding adds 0 times a model
            total += models[columns[:, place]].double() * terms[:, place : place + 1]
        models = total.to(models.dtype)[back]
    return models


def consensus(models: Tensor) -> float:
    """Mean squared distance of the rows to their mean: ``(1/m) ||X - J X||_F^2``."""
    values = models.double()
    return float((values - values.mean(0)).square().sum(1).mean())
