"""Client half of FedRep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from fedsim.core.model import ModelInfo
from fedsim.core.personal import head_of
from fedsim.core.program import Batch, LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class FedRep(LocalProgram):
    """First some epochs on the client's own last layer alone, then the others on the rest alone.

    Attributes:
        head_epochs: epochs on the last layer; the rest of `epochs` is for the shared layers.
        spans: first and last place of the last layer's entries in the vector; see `fitted`.
    """

    head_epochs: int = 1
    spans: tuple[Any, ...] = ()

    def private(self, info: ModelInfo) -> frozenset[str]:
        """The last layer."""
        return head_of(info)

    def fitted(self, info: ModelInfo) -> Self:
        """Learn where the last layer lies."""
        places = [info.layout.span(n) for n in info.layout.trainable if n in head_of(info)]
        return replace(self, spans=tuple((p.start, p.stop) for p in places))

    def personalise(self) -> LocalProgram:
        """The last layer is trained for the shared layers as they are now."""
        return replace(self, epochs=self.head_epochs)

    def init(self, s: LocalState) -> None:
        """Mark the last layer."""
        inside = torch.zeros_like(s.w, dtype=torch.bool)
        for first, last in self.spans:
            inside[..., first:last] = True
        s.inside = inside  # type: ignore[attr-defined]

    def step(self, s: LocalState, batch: Batch) -> None:
        """A step of which only one part of the vector is kept."""
        before, early = s.w.clone(), torch.as_tensor(batch.epoch) < self.head_epochs
        super().step(s, batch)
        s.w = torch.where(s.inside == early, s.w, before)  # type: ignore[attr-defined]
