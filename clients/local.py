"""Client half of local training alone."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.model import ModelInfo
from fedsim.core.program import LocalProgram


@dataclass(frozen=True, kw_only=True)
class Local(LocalProgram):
    """Local SGD on the client's own model, which it goes on with in every round."""

    def private(self, info: ModelInfo) -> frozenset[str]:
        """All of the model."""
        return frozenset(info.layout.names)
