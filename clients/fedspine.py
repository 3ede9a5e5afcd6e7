"""Client half of FedSpine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.lora.pruned import cut, restored
from fedsim.core.lora.serving import halves
from fedsim.core.packets import packet, packet_of
from fedsim.core.parts import widened
from fedsim.core.program import Gradient
from fedsim.core.pruning import Pruning
from fedsim.core.records import from_record
from fedsim.core.resident import ResidentProgram, ResidentState
from fedsim.core.structure import GATE, group_scores, ramp, sensitivity

TAIL = 5
"""Losses are reported over the first and the last fifth of the steps."""


@dataclass(frozen=True, kw_only=True)
class FedSpine(ResidentProgram):
    """Fine-tunes an adapter, and removes the heads and channels that matter least on the way.

    After every `interval` steps, and after the last, groups are removed until LoRAPrune's cubic
    schedule is met. Importance is read from the gradients of the LoRA factors, before the
    optimiser's step, and smoothed over the steps of the round. A removed group is gated off, which
    gives the outputs of the sliced model (`fedsim.models.pruning.sliced`).

    Attributes:
        rank: of the adapter that was sent.
        target: share that is to be gone at the end of the round.
        scope: what it is a share of, and where groups compete (`fedsim.core.pruning`).
        interval: steps between two prunings.
        smoothing: how much of the importance so far is kept at each step.
        first: share of the layers, from the input, that is not pruned.
        last: leave the last layer alone.
    """

    rank: int = 1
    target: float = 0.0
    scope: str = "layer"
    interval: int = 20
    smoothing: float = 0.9
    first: float = 0.1
    last: bool = True

    def pruning(self, s: ResidentState) -> Pruning:
        """What may be pruned, and how."""
        every = s.info.structures
        assert every is not None
        return Pruning(every, every.inner(self.first, self.last), self.scope)

    def kept(self, s: ResidentState) -> dict[str, Tensor]:
        """Which groups the message says are left."""
        return self.pruning(s).unpacked(packet_of(s.records["kept"]))

    def rebuild(self, s: ResidentState, flat: Tensor, held: bytes | None) -> None:
        """The adapter in its place, and the gates."""
        kept = self.kept(s)
        sent = restored(from_record(s.records["arrays"]), s.info, halves(s.info), kept)
        for name, value in sent.items():
            into = s.tensor(name)
            into.copy_(widened(value, into.shape))
        self.close(s, kept)

    def close(self, s: ResidentState, kept: Mapping[str, Tensor]) -> None:
        """Gate off what is gone; nothing of the adapter is left there."""
        every = self.pruning(s).structures
        for item in every.items:
            s.tensor(f"{item.columns[0]}.{GATE}" if item.columns[0] else GATE).copy_(
                kept[item.name]
            )
        rows, columns = every.sides(kept)
        velocity = getattr(s, "velocity", None)
        for path, pair in halves(s.info).items():
            for name, left, axis in zip(
                pair, (columns.get(path), rows.get(path)), (1, 0), strict=True
            ):
                if left is None:
                    continue
                views = [s.tensor(name)]
                if velocity is not None:
                    views.append(s.info.layout.view(velocity, name))
                for view in views:
                    gone = torch.ones(view.shape[axis], dtype=torch.bool)
                    gone[left] = False
                    view.masked_fill_(gone if axis else gone[:, None], 0.0)

    def scores(self, s: ResidentState, gradient: Tensor) -> dict[str, Tensor]:
        """Importance of every group that may be pruned, from one gradient."""
        plan, pairs, view = self.pruning(s), halves(s.info), s.info.layout.view
        every, elements = plan.structures, dict[str, Tensor]()
        for path in {p for item in plan.items for p in (*item.rows, item.columns[0])}:
            weight = s.tensor(every.weights[path])
            if path in pairs:
                a, b = pairs[path]
                elements[path] = sensitivity(
                    weight, s.tensor(a), s.tensor(b), view(gradient, a), view(gradient, b),
                    every.scalings[path],
                )  # fmt: skip
            else:  # no factors, no gradient: by magnitude
                elements[path] = weight.abs()
        return {item.name: group_scores(item, elements) for item in plan.items}

    def run(self, s: ResidentState) -> None:
        """Tune, prune, tune."""
        plan, sent = self.pruning(s), self.kept(s)
        kept, work, begun = sent, 0.0, plan.gone(sent)
        scores = {i.name: torch.zeros(i.groups) for i in plan.items}
        more = plan.due(kept, self.target)
        for step, batch in enumerate(s.batches(), 1):
            gradient = s.gradient(batch).dense()
            work += plan.structures.left(kept)
            if more:
                for name, now in self.scores(s, gradient).items():
                    if bool(torch.isfinite(now).all()):
                        scores[name].lerp_(now, 1 - self.smoothing)
            self.descend(s, Gradient(gradient))
            if more and (step % self.interval == 0 or step == s.num_steps):
                share = ramp(step, s.num_steps, begun, max(begun, self.target))
                kept = plan.lowered(kept, scores, share)
                self.close(s, kept)
        losses = s.measured
        tail = max(1, len(losses) // TAIL)
        s.metrics["loss_start"] = sum(losses[:tail]) / tail
        s.metrics["loss_end"] = sum(losses[-tail:]) / tail
        s.metrics["pruned"] = plan.gone(kept)
        s.metrics["compute"] = work / s.num_steps
        state = {n: s.tensor(n) for n in s.info.layout.names}
        mine = plan.travelling(sent, kept)
        s.replies["arrays"] = cut(state, s.info, halves(s.info), mine, self.rank)
        s.replies["kept"] = packet(plan.packed(kept))
