"""Client half of Per-FedAvg."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clients.fedavg import FedAvg
from fedsim.core.program import Batch, LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class PerFedAvg(LocalProgram):
    """Steps on ``F(w - alpha grad F(w))``, with the batch before (D) and the current one (D').

    ``w~ = w - alpha grad_D F(w)``, ``g = grad_D' F(w~)``, then ``w <- w - lr * g`` (first order)
    or, with the Hessian by a difference (HF) on D''= D,
    ``w <- w - lr * (g - alpha (grad F(w + delta g) - grad F(w - delta g)) / (2 delta))``.
    The first step of a round has no batch before and takes the current one for all.

    Attributes:
        alpha: length of the adaptation step.
        delta: length of the difference; 0: first order.
        tuning_epochs: epochs of length-`alpha` steps before the client is judged.
    """

    alpha: float = 0.01
    delta: float = 0.0
    tuning_epochs: int = 1

    def personalise(self) -> LocalProgram | None:
        """Local training with steps of length `alpha`."""
        if not (self.tuning_epochs and self.alpha):
            return None
        plain = FedAvg(batch_size=self.batch_size, lr=self.alpha, frozen_bn=self.frozen_bn)
        return replace(plain, epochs=self.tuning_epochs)

    def step(self, s: LocalState, batch: Batch) -> None:
        """One meta step."""
        before = getattr(s, "previous", None) or batch
        s.previous = batch  # type: ignore[attr-defined]
        if not self.alpha:
            super().step(s, batch)
            return
        adapted = s.w - self.alpha * s.gradient(before, at=s.w.clone()).dense()
        slope = s.gradient(batch, at=adapted).dense()
        if self.delta:
            ahead, behind = (
                s.gradient(before, at=s.w + sign * self.delta * slope).dense() for sign in (1, -1)
            )
            slope = slope - self.alpha * (ahead - behind) / (2 * self.delta)
        s.w = s.w - self.lr * (slope + self.weight_decay * s.w)
