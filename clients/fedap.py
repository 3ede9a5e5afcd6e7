"""Client half of FedAP."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsim.core.program import Batch, LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class FedAP(LocalProgram):
    """Local SGD from the received model, and some epochs more before the model is judged.

    Attributes:
        personal_epochs: epochs of personalisation, on a copy that is thrown away; 0: none.
        last_step: reply with the received model moved by the last local step alone, which is
            what first-order MAML averages: ``w + (w_k - w_{k-1})``.
    """

    personal_epochs: int = 0
    last_step: bool = False

    def personalise(self) -> LocalProgram | None:
        """Plain local training, `personal_epochs` long."""
        if not self.personal_epochs:
            return None
        return replace(self, epochs=self.personal_epochs, max_steps=0, last_step=False)

    def step(self, s: LocalState, batch: Batch) -> None:
        """As any local step; for FOMAML the place before it is remembered."""
        if self.last_step:
            s.before = s.w.clone()  # type: ignore[attr-defined]
        super().step(s, batch)

    def final(self, s: LocalState) -> None:
        """For FOMAML, take back all but the last step."""
        if hasattr(s, "before"):
            s.w = s.start + (s.w - s.before)
