"""Zeroth-order steps in place: a slope from two forward passes along a seeded random direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fedsim.core import directions
from fedsim.core.errors import require

BASES = ("gaussian", "rademacher", "rademacher32")
"""Directions of unit variance: the mean of slope times direction is the gradient."""


def require_plain(options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for training options that steps along a direction do not have."""
    for name in ("weight_decay", "momentum"):
        value = options.get(name, 0)
        require(not value, f"train.{name}", value, "0: a step goes along its direction alone")


def two_point(
    w: Tensor, seed: int, eps: float, loss: Callable[[], float], basis: str = "gaussian"
) -> tuple[float, float, float]:
    """Losses at ``w + eps z`` and ``w - eps z``, and the slope along z between them.

    Two walks; it leaves `w` at ``w - eps z``, so that restoring it and the step are one walk more.
    """
    directions.perturb(w, seed, eps, basis=basis)
    above = loss()
    directions.perturb(w, seed, -2 * eps, basis=basis)
    below = loss()
    return above, below, (above - below) / (2 * eps)


def land(
    w: Tensor, seed: int, eps: float, by: float, basis: str, start: Tensor | None = None
) -> None:
    """From ``w - eps z``, where `two_point` leaves `w`, to ``w + by z``, in one walk.

    It adds back what was taken away, up to rounding; or it begins from a copy of the `start`.
    """
    if start is None:
        directions.perturb(w, seed, eps + by, basis=basis)
        return
    w.copy_(start)
    if by:
        directions.perturb(w, seed, by, basis=basis)
