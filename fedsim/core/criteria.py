"""What a model is trained and judged by: one loss and its per-example measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core.errors import ConfigError

IGNORE = -100
"""Target value of positions that do not count (padding)."""
EACH = 0
"""No reduction, in the operators' own words."""
aten = torch.ops.aten


def _classes_last(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each position; outputs [..., classes], target [...]; ignored ones are 0."""
    losses = F.cross_entropy(
        outputs.reshape(-1, outputs.shape[-1]),
        target.reshape(-1),
        ignore_index=IGNORE,
        reduction="none",
    )
    return losses.view(target.shape)


def _squared(outputs: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (outputs.reshape(target.shape) - target).square()


@dataclass(frozen=True)
class Criterion:
    """A loss by name, as a mean for training and per example for evaluation.

    Calling it gives the scalar training loss of one client's batch: the mean over positions that
    count, weighted by `weight` (shape [B], zero for padding, or None for all ones).

    Attributes:
        name: of the criterion.
        elementwise: the loss of each position, from outputs and targets.
        classifies: whether targets are classes.
        many: whether an axis of clients stands in front of everything: one loss for each.
    """

    name: str
    elementwise: Callable[[Tensor, Tensor], Tensor]
    classifies: bool
    many: bool = False

    def __call__(self, outputs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        losses, first = self.elementwise(outputs, target), int(self.many)
        if weight is None and losses.dim() == first + 1:
            return losses.mean(first)
        counts = self._counts(target, losses.dtype, weight)
        total = counts.flatten(first).sum(first).clamp_min(1.0)
        return (losses * counts).flatten(first).sum(first) / total

    @torch.no_grad()
    def stacked(
        self, outputs: Tensor, target: Tensor, weight: Tensor | None = None, full: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Losses of many clients' batches at once, and their gradients, in closed form.

        Entry by entry what calling the criterion on each client's batch would give.

        Args:
            outputs: shape [C, B, ...], one batch for each of C clients.
            target: shape [C, B] or [C, B, T].
            weight: shape [C, B], zero for padding, or None for all ones.
            full: whether no target is `IGNORE`, which spares looking.

        Returns:
            losses of shape [C], and their gradients with respect to `outputs`, in its shape.
        """
        own = tuple(range(1, target.dim()))
        share = None  # as in a call: the mean over the batch
        if weight is not None or target.dim() > 2:
            counts = self._counts(target, outputs.dtype, weight, full)
            share = counts / counts.sum(own, keepdim=True).clamp_min_(1.0)
        if self.classifies:
            logs, index = outputs.log_softmax(-1).flatten(0, -2), target.reshape(-1)
            each, count = aten.nll_loss_forward(logs, index, None, EACH, IGNORE)
            losses = each.view(target.shape)
            up = torch.full_like(each, 1 / len(target[0])) if share is None else share.flatten()
            slopes = aten.nll_loss_backward(up, logs, index, None, EACH, IGNORE, count)
            slopes = aten._log_softmax_backward_data(slopes, logs, 1, logs.dtype)
        else:
            slopes = outputs.reshape(target.shape) - target
            losses = 0.5 * slopes.square()
            slopes.mul_(1 / len(target[0]) if share is None else share)
        mean = losses.mean(1) if share is None else (losses * share).sum(own)
        return mean, slopes.view(outputs.shape)

    def _counts(
        self, target: Tensor, dtype: torch.dtype, weight: Tensor | None, full: bool = False
    ) -> Tensor:
        """How much each position counts, in the shape of `target`."""
        counts = (target != IGNORE).to(dtype) if self.classifies and not full else None
        if weight is not None:
            each = weight.to(dtype).view(*weight.shape, *[1] * (target.dim() - weight.dim()))
            counts = each.expand_as(target) if counts is None else counts * each
        return torch.ones_like(target, dtype=dtype) if counts is None else counts

    def measure(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Per example: sum of losses, number right, number of positions; shape [3, B]."""
        losses = self.elementwise(outputs, target)
        counts = self._counts(target, losses.dtype, None)
        right = (
            (outputs.argmax(-1) == target).to(losses.dtype) * counts
            if self.classifies
            else torch.zeros_like(losses)
        )
        return torch.stack([t.unsqueeze(-1).flatten(1).sum(1) for t in (losses, right, counts)])


CRITERIA = {
    "cross_entropy": Criterion("cross_entropy", _classes_last, classifies=True),
    "next_token": Criterion("next_token", _classes_last, classifies=True),
    "mse": Criterion("mse", _squared, classifies=False),
}


def criterion(name: str) -> Criterion:
    """The criterion of that name. Raises `ConfigError` for an unknown one."""
    try:
        return CRITERIA[name]
    except KeyError:
        raise ConfigError(
            f"criterion = {name!r} is not known; allowed: {', '.join(CRITERIA)}"
        ) from None
