"""Client half of pFedMe."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.personal import PERSONAL, Own
from fedsim.core.program import Batch, LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class PFedMe(LocalProgram):
    """Local steps on the Moreau envelope of the client's loss (Algorithm 1).

    For each batch theta is found by `inner_steps` gradient steps of length `inner_lr` on
    ``F(theta) + (lam / 2) ||theta - w||^2``, begun at the last theta; then
    ``w <- w - lr * lam * (w - theta)``. theta is kept and is the client's own model.

    Attributes:
        lam: stiffness of the envelope.
        inner_steps: gradient steps for theta.
        inner_lr: their length; 0: `lr`.
    """

    keeps = (PERSONAL,)

    lam: float = 15.0
    inner_steps: int = 5
    inner_lr: float = 0.0

    def personalise(self) -> LocalProgram:
        """The client is judged with its theta."""
        return Own()

    def init(self, s: LocalState) -> None:
        """Begin at the received model."""
        s.theta = s.w.clone()  # type: ignore[attr-defined]

    def step(self, s: LocalState, batch: Batch) -> None:
        """Find theta for this batch, then move w towards it."""
        theta, length = s.theta, self.inner_lr or self.lr  # type: ignore[attr-defined]
        for _ in range(self.inner_steps):
            slope = s.gradient(batch, at=theta).dense()
            theta = theta - length * (slope + self.lam * (theta - s.w))
        s.theta = theta  # type: ignore[attr-defined]
        s.w = s.w - self.lr * self.lam * (s.w - theta)

    def final(self, s: LocalState) -> None:
        """Keep theta."""
        s.kept[PERSONAL] = s.theta  # type: ignore[attr-defined]
