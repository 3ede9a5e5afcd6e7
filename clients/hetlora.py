"""Client half of HetLoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from fedsim.core.lora.federated import hetlora_tail
from fedsim.core.lora.serving import halves
from fedsim.core.model import ModelInfo
from fedsim.core.program import LocalProgram, LocalState

TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class HetLoRA(LocalProgram):
    """Local SGD with a penalty on the last ranks, which are cut off if they shrank.

    Cho et al. 2024, as described second-hand; see the strategy. The gradient of
    ``|B_t|_F |A_t|_F`` is ``|B_t| A_t / |A_t|`` and ``|A_t| B_t / |B_t|``.

    Attributes:
        rank: of this client.
        gamma: share of it before the tail.
        penalty: before the penalty.
        places: place and shape of A and of B of every module; see `fitted`.
    """

    rank: int = 1
    gamma: float = 0.99
    penalty: float = 0.001
    places: tuple[Any, ...] = ()

    def fitted(self, info: ModelInfo) -> Self:
        """Learn where the factors lie."""
        shapes = dict(zip(info.layout.names, info.layout.shapes, strict=True))
        return replace(
            self,
            places=tuple(
                tuple((info.layout.span(n), shapes[n]) for n in pair)
                for pair in halves(info).values()
            ),
        )

    def tails(self, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the last ranks of A and of B, module by module."""
        first, end = hetlora_tail(self.rank, self.gamma), self.rank
        for (span_a, shape_a), (span_b, shape_b) in self.places:
            a, b = w[..., span_a].unflatten(-1, shape_a), w[..., span_b].unflatten(-1, shape_b)
            yield a[..., first:end, :], b[..., first:end]

    def tail(self, w: Tensor) -> Tensor:
        """Sum over modules of the tails' norm products."""
        norm = torch.linalg.matrix_norm
        total = torch.zeros_like(w[..., :1])
        for a, b in self.tails(w):
            if a.shape[-2]:
                total = total + (norm(a) * norm(b)).unsqueeze(-1)
        return total

    def correction(self, s: LocalState) -> Tensor | None:
        """Gradient of the penalty."""
        if not self.penalty:
            return None
        out = torch.zeros_like(s.w)
        for (a, b), (into_a, into_b) in zip(self.tails(s.w), self.tails(out), strict=True):
            if a.shape[-2]:
                one, two = (torch.linalg.matrix_norm(t, keepdim=True) for t in (a, b))
                into_a.copy_(self.penalty * two / one.clamp_min(TINY) * a)
                into_b.copy_(self.penalty * one / two.clamp_min(TINY) * b)
        return out

    def final(self, s: LocalState) -> None:
        """Report the rank: cut down where the tail shrank."""
        short = hetlora_tail(self.rank, self.gamma)
        before = self.tail(s.start)
        shrank = (self.tail(s.w) < before) & torch.isfinite(before)
        left = torch.where(shrank, float(short), float(self.rank))
        s.metrics["rank"] = left.squeeze(-1) if math.prod(left.shape) > 1 else left.reshape(())
