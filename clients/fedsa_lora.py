"""Client half of FedSA-LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.lora.serving import factors_of
from fedsim.core.model import ModelInfo
from fedsim.core.program import LocalProgram


@dataclass(frozen=True, kw_only=True)
class FedSALoRA(LocalProgram):
    """Local SGD on the shared A and the client's own B together (Guo et al. 2025)."""

    def private(self, info: ModelInfo) -> frozenset[str]:
        """The factors B."""
        return factors_of(info, "b")
