"""Centralised training in a federation's terms: one client that holds what all the others have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedsim.core.errors import DataError
from fedsim.core.rng import SERVER, stream
from fedsim.data.federated import FederatedData, Ragged, digest

POOL = "pool"
"""Name of the client that holds the pooled examples."""


def pooled(data: FederatedData, share: float, seed: int) -> FederatedData:
    """The same federation with one client more, which alone trains, on everybody's examples.

    It is a baseline: what is learned where examples may be brought together. Who is judged, and on
    which examples, stays as it was, so the comparison with federated runs is paired.

    Args:
        data: the federation; examples of clients that are never trained on stay out of the pool.
        share: share of all training examples that the pool has, drawn at random, in (0, 1].
        seed: of that draw.

    Returns:
        The federation: the pool comes last, holds nothing out, and is in a group of its own; all
        other clients are held-out clients.

    Raises:
        DataError: there is nothing to pool.
    """
    clients = data.num_clients
    trained = np.setdiff1d(np.arange(clients), data.heldout_clients)
    everything = np.unique(data.train.take(trained).values)
    if not len(everything):
        raise DataError("pooled training needs training examples, and no client has any")
    drawn = stream(seed, 0, SERVER, POOL).permutation(everything)
    pool = np.sort(drawn[: max(1, round(share * len(everything)))])
    groups = data.groups
    return replace(
        data,
        train=_with(data.train, pool),
        test=_with(data.test, pool[:0]),
        client_names=(*data.client_names, POOL),
        heldout_clients=np.arange(clients),
        groups=None if groups is None else np.append(groups, groups.max() + 1),
        fingerprint=digest(data.fingerprint, POOL, pool),
    )


def _with(rows: Ragged, more: np.ndarray) -> Ragged:
    return Ragged.from_lengths(
        np.concatenate([rows.values, more]), np.append(rows.lengths, len(more))
    )
