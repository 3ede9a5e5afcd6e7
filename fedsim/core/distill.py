"""Losses of distillation: one network is fitted to what another, or many others, said.

Torch's ``kl_div`` with its default reduction divides by the number of classes as well as by the
number of examples; here that is asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedsim.core.errors import require


def divergence(
    target: Tensor, outputs: Tensor, temperature: float = 1.0, over_classes: bool = False
) -> Tensor:
    """``KL(target || softmax(outputs / temperature))`` of each example, shape [n].

    Args:
        target: probabilities, shape [n, C].
        outputs: logits, shape [n, C].
        temperature: softens `outputs`; `target` is taken as it is.
        over_classes: divide by C, as torch's ``reduction="mean"`` does.
    """
    logs = (outputs / temperature).log_softmax(-1)
    terms = torch.special.xlogy(target, target) - target * logs
    return terms.mean(-1) if over_classes else terms.sum(-1)


def kl(outputs: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``tau^2 KL(target || softmax(outputs / tau))``, mean over the batch."""
    return divergence(target, outputs, temperature).mean() * temperature**2


def ce_soft(outputs: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Cross-entropy with probabilities as targets, mean over the batch."""
    return -(target * (outputs / temperature).log_softmax(-1)).sum(-1).mean() * temperature**2


def mae_logit(outputs: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean absolute error on logits, over batch and classes."""
    return (outputs - target).abs().mean()


def mse_logit(outputs: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean squared error on logits, over batch and classes."""
    return (outputs - target).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl": kl,
    "ce_soft": ce_soft,
    "mae_logit": mae_logit,
    "mse_logit": mse_logit,
}
"""``loss(outputs, target, temperature)`` by name."""


def check_loss(name: str, value: str, space: str) -> None:
    """Raise `ConfigError` unless the loss exists and takes targets of that space."""
    allowed = [n for n in LOSSES if n.endswith("_logit") == (space == "logit")]
    require(value in allowed, name, repr(value), f"one of {', '.join(allowed)} in space {space!r}")
