"""PACFL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from scipy.spatial.distance import squareform

from fedsim.core.averaging import metrics_of
from fedsim.core.hierarchical import HierarchicalStrategy
from fedsim.core.records import FlatRecord, as_flat

Angle = Literal["elementwise", "principal"]
EVERYTHING = 2**30
"""A batch size that no client's examples exceed."""


class PACFL(HierarchicalStrategy):
    """PACFL: clusters by the angles between the subspaces of the clients' examples, then FedAvg.

    Vahidian et al., *Efficient Distribution Similarity Identification in Clustered Federated
    Learning via Principal Angles*, AAAI 2023, after the authors' code: in the first round nobody
    trains; clients send singular vectors of their raw examples, which costs privacy. Proximity is
    the least of ``arccos(U_i^T U_j)`` over the entries, in degrees, which is not the smallest
    principal angle (``angle = "principal"`` is). Linkage is theirs, scipy's ``"weighted"``, cut at
    `t` degrees.

    Args:
        n_basis: singular vectors of each label.
        angle: ``"elementwise"`` or ``"principal"``.
        t: threshold in degrees.
        options: other options of `HierarchicalStrategy`, such as `cut`.
    """

    client = "pacfl"

    def __init__(
        self, n_basis: int = 5, angle: Angle = "elementwise", t: float = 4.9, **options: Any
    ) -> None:
        given = {"linkage": "weighted", "cut": "distance", **options}
        fixed = {"warmup_rounds": 0, "init": "global", "merge_below": 0.0, "unit": False}
        super().__init__(t=t, **{**given, **fixed})
        self.n_basis, self.angle, self.features = n_basis, angle, 1

    def told(self, node: int, server_round: int) -> dict[str, Any]:
        """Ask newcomers for their basis."""
        if not (self.due(server_round) or node not in self.members):
            return {"basis": False, "n_basis": self.n_basis}
        whole = {"epochs": 1, "max_steps": 1, "batch_size": EVERYTHING}
        return {"basis": True, "n_basis": self.n_basis, **whole}

    def expected(self, sent: RecordDict) -> Mapping[str, ArrayRecord]:
        """A model, and the basis where it was asked for."""
        records = dict(sent.array_records)
        if sent.config_records["config"].get("basis"):
            layout = self.setting.info.layout
            own = layout.restrict(frozenset(layout.trainable))
            records["basis"] = FlatRecord(own, torch.empty(own.size, dtype=own.dtype))
        return records

    def signature_of(self, record: ArrayRecord, reply: Message) -> Any:
        """The basis."""
        basis = as_flat(reply.content.array_records["basis"]).flat
        self.features = int(
            min(max(1, float(str(metrics_of(reply.content).get("features", 1)))), len(basis))
        )
        return basis.double().numpy()

    def angles(self, one: Any, other: Any) -> float:
        """Degrees between two bases."""
        u, v = (
            a[: len(a) // self.features * self.features].reshape(-1, self.features)
            for a in (one, other)
        )
        products = u @ v.T
        if self.angle == "principal":
            products = np.linalg.svd(products, compute_uv=False)
        return float(np.degrees(np.arccos(np.clip(products.max(), -1.0, 1.0))))

    def pairs_of(self, points: Any) -> Any:
        """Angles of all pairs."""
        square = np.zeros((len(points), len(points)))
        for i, j in zip(*np.triu_indices(len(points), 1), strict=True):
            square[i, j] = square[j, i] = self.angles(points[i], points[j])
        return squareform(square)

    def centre_of(self, points: Any) -> torch.Tensor:
        """All bases of a cluster."""
        return torch.from_numpy(points)

    def costs(self, point: Any, names: list[int]) -> Any:
        """Mean angle to the members of each cluster."""
        found = ([self.angles(point, one) for one in self.centres[c][1].numpy()] for c in names)
        return np.array([np.mean(angles) for angles in found])
