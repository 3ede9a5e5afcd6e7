"""Client half of APFL."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.personal import PERSONAL, Own, own
from fedsim.core.program import Batch, LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class APFL(LocalProgram):
    """Local SGD on the shared model w, and on v through the mixture ``alpha v + (1 - alpha) w``.

    ``v <- v - lr * alpha * grad F(alpha v + (1 - alpha) w)``; v is kept.

    Attributes:
        alpha: share of the client's own model in the mixture.
    """

    keeps = (PERSONAL,)

    alpha: float = 0.5

    def personalise(self) -> LocalProgram:
        """The client is judged with the mixture of its own model and the received one."""
        return Own(share=self.alpha)

    def init(self, s: LocalState) -> None:
        """Take up the client's own model."""
        s.own = own(s).clone()  # type: ignore[attr-defined]

    def step(self, s: LocalState, batch: Batch) -> None:
        """One step of each model, both from where they stood."""
        v = s.own  # type: ignore[attr-defined]
        mixed = self.alpha * v + (1 - self.alpha) * s.w
        slope = s.gradient(batch, at=mixed).dense()
        s.own = v - self.lr * self.alpha * slope  # type: ignore[attr-defined]
        super().step(s, batch)

    def final(self, s: LocalState) -> None:
        """Keep the client's own model."""
        s.kept[PERSONAL] = s.own  # type: ignore[attr-defined]
