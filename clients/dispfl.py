"""Client half of DisPFL."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim.core.model import ModelInfo
from fedsim.core.program import Batch, Gradient, LocalProgram, LocalState

MASK = "mask"


@dataclass(frozen=True, kw_only=True)
class DisPFL(LocalProgram):
    """Local SGD on the entries that a node's mask leaves, and a step of the mask itself.

    After training, in every masked layer the fraction ``a_t = anneal / 2 (1 + cos(pi t / T))`` of
    the active entries, those of smallest magnitude, is dropped, and as many entries that were not
    active are taken in, those of largest gradient on the last minibatch; they start from 0.

    Attributes:
        anneal: fraction dropped in the first round.
        total: T, the number of rounds.
    """

    anneal: float = 0.5
    total: int = 1
    spans: tuple[tuple[int, int, int], ...] = ()

    def fitted(self, info: ModelInfo) -> DisPFL:
        """Learn where the masked layers lie: start, end, number of axes."""
        layout = info.layout
        spans = []
        for name in layout.trainable:
            span, shape = layout.span(name), layout.shapes[layout.names.index(name)]
            spans.append((span.start, span.stop, len(shape)))
        return replace(self, spans=tuple(spans))

    def step(self, s: LocalState, batch: Batch) -> None:
        """One masked step; the whole gradient is remembered for the mask."""
        gradient = s.gradient(batch, training=not self.frozen_bn).dense()
        s.slope = gradient  # type: ignore[attr-defined]
        self.descend(s, Gradient(gradient * s.received[MASK]))

    def final(self, s: LocalState) -> None:
        """Drop and take in; send the mask, and the model without what it drops."""
        mask = s.received[MASK].clone()
        slope = getattr(s, "slope", torch.zeros_like(s.w))
        share = self.anneal / 2 * (1 + math.cos(math.pi * s.round / max(self.total, 1)))
        for start, end, axes in self.spans:
            if axes > 1:
                mine = slice(start, end)
                mask[..., mine] = evolved(mask[..., mine], s.w[..., mine], slope[..., mine], share)
        s.w = s.w * mask * s.received[MASK]
        s.sent[MASK] = mask


def evolved(mask: Tensor, weight: Tensor, slope: Tensor, share: float) -> Tensor:
    """The mask of one layer after a step: as many active entries as before.

    Args:
        mask: 0 or 1, shape [..., n]; every row has as many ones.
        weight: the layer, shape [..., n].
        slope: its gradient, shape [..., n].
        share: of the active entries that are dropped.
    """
    count = int(mask.reshape(-1, mask.shape[-1])[0].sum())
    moved = min(int(share * count), mask.shape[-1] - count)
    if not moved:
        return mask
    active = mask > 0
    low = weight.abs().masked_fill(~active, torch.inf).topk(moved, dim=-1, largest=False).indices
    high = slope.abs().masked_fill(active, -torch.inf).topk(moved, dim=-1).indices
    return mask.scatter(-1, low, 0.0).scatter(-1, high, 1.0)
