"""Local training alone."""

from __future__ import annotations

from fedsim.core.model import ModelInfo
from fedsim.core.personal import Shared
from strategies.fedavg import FedAvg


class Local(Shared, FedAvg):
    """Local training alone: every client trains a model of its own, and nothing is shared.

    The baseline that federated learning has to beat on clients' own examples. All clients begin
    with the same initial model; no parameter ever travels.
    """

    client = "local"

    def __init__(self) -> None:
        super().__init__()

    def private(self, info: ModelInfo) -> frozenset[str]:
        """Everything."""
        return frozenset(info.layout.names)
