"""Client half of IFCA."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsim.core.program import Batch, LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class IFCA(LocalProgram):
    """Choose the model with the least loss on the own training examples, then local SGD from it.

    With k > 1 models the first of `epochs` is for judging them and trains nothing. The choice goes
    back as the metric ``cluster``.

    Attributes:
        k: number of models: the one received as `arrays`, and ``model1``, ``model2``, ...
    """

    vectorized = False

    k: int = 1

    def init(self, s: LocalState) -> None:
        """No loss is known yet."""
        s.metrics["cluster"] = 0
        s.judged = torch.zeros(self.k, dtype=torch.float64)  # type: ignore[attr-defined]

    def step(self, s: LocalState, batch: Batch) -> None:
        """In the first epoch, judge; then train."""
        models = [s.start, *(s.received[f"model{j}"] for j in range(1, self.k))]
        if self.k > 1 and batch.epoch == 0:
            losses = torch.cat([s.loss_at(batch, model) for model in models])
            s.judged += losses.double() * len(batch.fields["y"])  # type: ignore[attr-defined]
            s.metrics["cluster"] = s.judged.argmin()  # type: ignore[attr-defined]
            s.w = models[int(s.metrics["cluster"])]
            return
        super().step(s, batch)
