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
    """

    name: str
    elementwise: Callable[[Tensor, Tensor], Tensor]
    classifies: bool

    def __call__(self, outputs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        losses = self.elementwise(outputs, target)
        if weight is None and losses.dim() == 1:
            return losses.mean()
        counts = self._counts(target, losses, weight)
        return (losses * counts).sum() / counts.sum().clamp_min(1.0)

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
        if self.classifies:
            index = (target if full else target.clamp_min(0)).unsqueeze(-1)
            logs = outputs.log_softmax(-1)
            losses = logs.gather(-1, index).squeeze(-1).neg_()
            slopes = logs.exp_()
            slopes.scatter_add_(-1, index, slopes.new_full((1,), -1.0).expand(index.shape))
        else:
            slopes = outputs.reshape(target.shape) - target
            losses = 0.5 * slopes.square()
            slopes = slopes.view(outputs.shape)
        simple = weight is None and losses.dim() == 2  # as in a call: the mean over the batch
        if simple and (full or not self.classifies):
            return losses.mean(1), slopes.mul_(1.0 / losses.shape[1])
        counts = torch.ones_like(losses)
        if self.classifies and not full:
            counts = (target != IGNORE).to(losses.dtype)
        if weight is not None:
            counts = counts * weight.to(counts.dtype).view(*weight.shape, *[1] * (losses.dim() - 2))
        total = counts.flatten(1).sum(1).clamp_min(1.0)
        share = counts / (losses.shape[1] if simple else total.view(-1, *[1] * (losses.dim() - 1)))
        mean = (losses * share).flatten(1).sum(1)
        return mean, slopes.mul_(share.unsqueeze(-1) if share.dim() < slopes.dim() else share)

    def _counts(self, target: Tensor, losses: Tensor, weight: Tensor | None) -> Tensor:
        counts = torch.ones_like(losses)
        if self.classifies:
            counts = counts * (target != IGNORE).to(losses.dtype)
        if weight is not None:
            counts = counts * weight.view(-1, *[1] * (losses.dim() - 1)).to(losses.dtype)
        return counts

    def measure(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Per example: sum of losses, number right, number of positions; shape [3, B]."""
        losses = self.elementwise(outputs, target)
        counts = self._counts(target, losses, None)
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
