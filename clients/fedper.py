"""Client half of FedPer."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.model import ModelInfo
from fedsim.core.personal import head_of
from fedsim.core.program import LocalProgram


@dataclass(frozen=True, kw_only=True)
class FedPer(LocalProgram):
    """Local SGD on the shared layers and the client's own last layer together."""

    def private(self, info: ModelInfo) -> frozenset[str]:
        """The last layer."""
        return head_of(info)
