"""Client half of FedProx."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.core.program import LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class FedProx(LocalProgram):
    """Local SGD on ``F_k(w) + (mu / 2) ||w - w_t||^2`` (Li et al. 2020, Eq. 2).

    Attributes:
        mu: weight of the proximal term; its gradient is ``mu * (w - w_t)``.
    """

    mu: float = 0.0

    def correction(self, s: LocalState) -> Tensor | None:
        """The gradient of the proximal term."""
        return (s.w - s.start).mul_(self.mu) if self.mu else None
