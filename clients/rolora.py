"""Client half of RoLoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from fedsim.core.lora.serving import factors_of, mask, where
from fedsim.core.model import ModelInfo
from fedsim.core.parts import Shapes
from fedsim.core.program import Batch, LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class RoLoRA(LocalProgram):
    """Local SGD on one of the two factors (Chen et al. 2025).

    Attributes:
        trains: which one, ``"a"`` or ``"b"``.
        frozen: places of the other one in the vector; see `fitted`.
    """

    trains: str = "b"
    frozen: tuple[Any, ...] = ()

    def fitted(self, info: ModelInfo) -> Self:
        """Learn where the frozen factor lies."""
        return replace(self, frozen=where(info, "a" if self.trains == "b" else "b"))

    def answers(self, info: ModelInfo, sent: Shapes) -> Shapes:
        """All but the frozen factor."""
        frozen = factors_of(info, "a" if self.trains == "b" else "b")
        return {n: shape for n, shape in sent.items() if n not in frozen}

    def step(self, s: LocalState, batch: Batch) -> None:
        """A step that leaves the frozen factor where it was."""
        super().step(s, batch)
        s.w = torch.where(mask(s.w, self.frozen), s.start, s.w)
