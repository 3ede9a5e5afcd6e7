"""Client half of FedBN."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.model import ModelInfo
from fedsim.core.personal import norms_of
from fedsim.core.program import LocalProgram


@dataclass(frozen=True, kw_only=True)
class FedBN(LocalProgram):
    """Local SGD with the client's own BatchNorm layers."""

    def private(self, info: ModelInfo) -> frozenset[str]:
        """Weights, biases and statistics of BatchNorm layers."""
        return norms_of(info)
