"""Client half of FFA-LoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from fedsim.core.lora.serving import factors_of, mask, where
from fedsim.core.model import ModelInfo
from fedsim.core.program import Batch, LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class FFALoRA(LocalProgram):
    """Local SGD on B alone; A stays as it was initialised (Sun et al. 2024).

    Attributes:
        frozen: places of A in the vector; see `fitted`.
    """

    frozen: tuple[Any, ...] = ()

    def private(self, info: ModelInfo) -> frozenset[str]:
        """The factors A, which are everybody's and need not travel."""
        return factors_of(info, "a")

    def fitted(self, info: ModelInfo) -> Self:
        """Learn where the factors A lie."""
        return replace(self, frozen=where(info, "a"))

    def step(self, s: LocalState, batch: Batch) -> None:
        """A step that leaves A where it was."""
        super().step(s, batch)
        s.w = torch.where(mask(s.w, self.frozen), s.start, s.w)
