"""Client half of FedLD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.criteria import IGNORE, Criterion
from fedsim.core.errors import ConfigError
from fedsim.core.program import LocalProgram

FORMS = ("prob", "logit")


@dataclass(frozen=True, kw_only=True)
class FedLD(LocalProgram):
    """Local SGD on ``cross-entropy + margin_lambda * margin``; replies with ``w_m - w``.

    The margin term is `margin`. Batch-normalisation statistics may be frozen (`frozen_bn`), which
    is what the authors' code does.

    Attributes:
        margin_lambda: weight of the margin term; 0 leaves the plain loss, bit for bit.
        margin_form: ``"prob"`` or ``"logit"``.

    Raises:
        ConfigError: there is no such form, or the task is no classification.
    """

    replies = "delta"
    axial_loss = True

    margin_lambda: float = 0.0
    margin_form: str = "prob"

    def __post_init__(self) -> None:
        if self.margin_form not in FORMS:
            raise ConfigError(
                f"margin_form = {self.margin_form!r} must be one of {', '.join(FORMS)}"
            )

    def loss(
        self, criterion: Criterion, outputs: Tensor, target: Tensor, weight: Tensor | None
    ) -> Tensor:
        """The task's loss plus the margin term over the positions that count."""
        value = super().loss(criterion, outputs, target, weight)
        if not self.margin_lambda:
            return value
        if not criterion.classifies:
            raise ConfigError(f"margin control needs classes; the task's loss is {criterion.name}")
        if criterion.name == "next_token":  # one row for each position of a sequence
            real = (target != IGNORE).to(outputs.dtype)
            weight = (real if weight is None else real * weight.unsqueeze(-1)).flatten(-2)
            outputs = outputs.flatten(-3, -2)
        return value + self.margin_lambda * margin(outputs, weight, self.margin_form)


def margin(logits: Tensor, weight: Tensor | None = None, form: str = "prob") -> Tensor:
    """The margin-control term of FedLD for one client's batch, a scalar; axes in front stay.

    With P = softmax(logits), the authors' code (`MarginalLogLoss`) takes one logarithm for the
    batch, and their Figure 1 one for each example, of the outputs themselves::

        "prob"   log(1 + sum_b ||P_b||^2)        in [log(1 + B / C), log(1 + B)], least at P = 1/C
        "logit"  mean_b log(1 + ||logits_b||^2)  in [0, inf), least at logits = 0

    The first depends on the batch size B; that the second is averaged over the batch is our choice
    (the figure shows one example).

    Args:
        logits: shape [B, C].
        weight: shape [B], 0 for padding and 1 otherwise; None means all ones.
        form: ``"prob"`` or ``"logit"``.
    """
    squares = (logits.softmax(-1) if form == "prob" else logits).square().sum(-1)
    if form == "prob":
        return torch.log1p((squares if weight is None else squares * weight).sum(-1))
    terms = torch.log1p(squares)
    if weight is None:
        return terms.mean(-1)
    return (terms * weight).sum(-1) / weight.sum(-1).clamp_min(1.0)
