"""Client half of Ditto."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.personal import PERSONAL, Own, own
from fedsim.core.program import Batch, LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class Ditto(LocalProgram):
    """Local SGD on the shared model and, on the same batches, on the client's own (Algorithm 1).

    ``v_k <- v_k - lr (grad F_k(v_k) + lam (v_k - w^t))`` with w^t as received; v_k is kept.

    Attributes:
        lam: pull of the client's own model to the shared one.
    """

    keeps = (PERSONAL,)

    lam: float = 1.0

    def personalise(self) -> LocalProgram:
        """The client is judged with its own model."""
        return Own()

    def init(self, s: LocalState) -> None:
        """Take up the client's own model."""
        s.own = own(s).clone()  # type: ignore[attr-defined]

    def step(self, s: LocalState, batch: Batch) -> None:
        """One step of each model."""
        v = s.own  # type: ignore[attr-defined]
        slope = s.gradient(batch, at=v).dense() + self.lam * (v - s.start)
        s.own = v - self.lr * (slope + self.weight_decay * v)  # type: ignore[attr-defined]
        super().step(s, batch)

    def final(self, s: LocalState) -> None:
        """Keep the client's own model."""
        s.kept[PERSONAL] = s.own  # type: ignore[attr-defined]
