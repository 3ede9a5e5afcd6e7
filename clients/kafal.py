"""Client half of KAFAL and of the other strategies of active learning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsim.core.agent import AgentState
from fedsim.core.criteria import Criterion
from fedsim.core.distill import divergence
from fedsim.core.labelling import Labelling
from fedsim.core.pool import Pool
from fedsim.core.program import Batch, Gradient, LocalProgram, LocalState
from fedsim.core.records import FlatRecord

VELOCITY = "velocity"
Mixed = Iterator[tuple[Tensor, Tensor, Tensor]]
"""Mixed inputs [n, ...], the teacher's probabilities [n, C], weights [n]."""


def prior_shift(counts: Tensor) -> Tensor:
    """``log n`` up to a constant: zeros where all classes are alike, -inf where one is absent."""
    return (counts / counts.max()).log()


def compensation(counts: Tensor) -> Tensor:
    """Gamma: proportional to 1/n on the labelled classes, 0 on absent ones; sums to 1."""
    ratios = torch.where(counts > 0, counts.sum() / (counts + 1e-6), torch.zeros_like(counts))
    return ratios / ratios.sum()


@dataclass(frozen=True, kw_only=True)
class Compensated(LocalProgram):
    """Knowledge-compensatory local steps (KCFU), or plain SGD where nothing of it is given.

    ``L = CE(z + shift, y) + mean_j w_j KL(teacher || student)(x_j) / C`` on a labelled batch and a
    mixed unlabelled one; momentum and the epochs of the cycle go on from round to round.

    Attributes:
        shift: added to the logits in training, shape [C].
        mixed: unlabelled batches with their targets, one for each step; None: no distillation.
        strength: weight of the distillation.
        persist: keep the momentum between rounds.
        done: local epochs of this cycle before this round.
        milestone: epoch of the cycle from which on the learning rate is a tenth; 0: none.
    """

    vectorized = False
    keeps = (VELOCITY,)

    shift: Tensor | None = None
    mixed: Mixed | None = None
    strength: float = 1.0
    persist: bool = True
    done: int = 0
    milestone: int = 0

    def loss(
        self, criterion: Criterion, outputs: Tensor, target: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Shifted cross-entropy for labels, weighted divergence for probabilities."""
        if target.is_floating_point() and weight is not None:
            return self.strength * (weight * divergence(target, outputs, over_classes=True)).mean()
        shifted = outputs if self.shift is None else outputs + self.shift.to(outputs.dtype)
        return super().loss(criterion, shifted, target, weight)

    def init(self, s: LocalState) -> None:
        """Take up the momentum."""
        s.distilled = []  # type: ignore[attr-defined]
        if self.momentum and self.persist:
            s.velocity = s.kept[VELOCITY].clone()  # type: ignore[attr-defined]

    def step(self, s: LocalState, batch: Batch) -> None:
        """One step on both losses; two passes, so that BatchNorm sees the batches apart."""
        gradient = s.gradient(batch, training=not self.frozen_bn)
        if self.mixed is not None:
            x, target, weight = next(self.mixed)
            fields = {"x": x, "y": target, "weight": weight}
            extra = s.gradient(Batch(fields, batch.epoch, batch.step))
            s.distilled.append(float(s.losses.pop()))  # type: ignore[attr-defined]
            gradient = Gradient(gradient.dense() + extra.dense())
        late = self.milestone and self.done + batch.epoch + 1 >= self.milestone
        (replace(self, lr=self.lr * 0.1) if late else self).descend(s, gradient)

    def final(self, s: LocalState) -> None:
        """Keep the momentum."""
        s.kept[VELOCITY] = getattr(s, VELOCITY, torch.zeros_like(s.w))
        distilled = s.distilled  # type: ignore[attr-defined]
        s.metrics["distillation"] = float(np.mean(distilled)) if distilled else 0.0


@dataclass(frozen=True, kw_only=True)
class KAFAL(Labelling):
    """A client with a pool of examples, labelled by KSAS or another rule, that trains by KCFU.

    Attributes:
        turn: round of the cycle, from 0; there is no distillation in the first.
        kcfu: train with shifted cross-entropy and distillation.
        strength: weight of the distillation.
        mix: partners in mixup: another order of the batch, ``"perm"``, or its first image for all,
            ``"single"``.
        alpha: of mixup's Beta(alpha, alpha).
        teacher: mode of the teacher, ``"eval"`` or ``"train"``.
        unlabelled: distil on the ``"current"`` unlabelled examples or on the ``"initial"`` ones.
        milestone: see `Compensated`.
    """

    turn: int = 0
    kcfu: bool = True
    strength: float = 1.0
    mix: str = "perm"
    alpha: float = 2.0
    teacher: str = "eval"
    unlabelled: str = "current"
    milestone: int = 0

    def program(self, s: AgentState, pool: Pool, start: FlatRecord, done: int) -> Compensated:
        """This round's local training."""
        shift = prior_shift(pool.counts) if self.kcfu else None
        mixed = None
        if self.kcfu and self.turn > 0 and self.strength and len(pool.unlabelled):
            mixed = self._mixed(s, pool, start)
        return self.local(Compensated, shift=shift, mixed=mixed, done=done)

    def _mixed(self, s: AgentState, pool: Pool, teacher: FlatRecord) -> Mixed:
        """Endless mixed batches of unlabelled examples, judged by the frozen global model."""
        first = s.kept("first")
        rows = first["rows"] if self.unlabelled == "initial" and first else pool.unlabelled
        draw, gamma = s.stream("mixup"), compensation(pool.counts)
        while True:
            order = draw.permutation(len(rows))
            for at in range(0, len(order), self.batch_size):
                x = s.inputs(rows[order[at : at + self.batch_size]])
                n = len(x)
                beta = torch.from_numpy(draw.beta(self.alpha, self.alpha, n)).to(x.dtype)
                other = torch.from_numpy(draw.permutation(n))
                if self.mix == "single":
                    other = other[:1].expand(n)
                lam = beta.view(-1, *[1] * (x.dim() - 1))
                blend = lam * x + (1 - lam) * x[other]
                said = s.outputs(teacher, blend, training=self.teacher == "train")
                own = gamma.to(x.dtype)[said.argmax(-1)]
                yield blend, said.softmax(-1), beta * own + (1 - beta) * own[other]
