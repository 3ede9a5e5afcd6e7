"""Merge adapter folders: `merge([...])` in Python, `fedsim merge-lora` on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.core import lora
from fedsim.core.errors import ConfigError, DataError
from fedsim.core.lora import Factors, Lego, Merged
from fedsim.core.text import did_you_mean, shown
from fedsim.models.adapters import PeftAdapter, check_base, places, read_adapter

RANKED = ("lego", "flexlora", "ensemble", "task_arithmetic")
"""Methods whose rank can be chosen."""
METHODS: dict[str, tuple[str, ...]] = {
    "lego": tuple(f.name for f in fields(Lego) if f.name != "rank"),
    "fedit": (),
    "flora": (),
    "flexlora": (),
    "hetlora": (),
    "ensemble": (),
    "task_arithmetic": ("coefficient",),
    "ties": ("density", "space"),
    "dare": ("density", "space", "seed", "elect"),
}
"""What merges, and the options of each."""


@dataclass(frozen=True, eq=False)
class MergedAdapter(PeftAdapter):
    """An adapter that was merged from others.

    Attributes:
        details: for LoRA-LEGO, how each module came about.
    """

    details: Mapping[str, Merged] = field(default_factory=dict)

    @property
    def degenerate(self) -> bool:
        """Whether LoRA-LEGO clustered every module by rank index: the sources share a start."""
        return bool(self.details) and all(d.by_rank_index for d in self.details.values())

    @property
    def gamma(self) -> tuple[float, float] | None:
        """Mean and largest factor of LoRA-LEGO's parameter reweighting, over all clusters."""
        every = [g for d in self.details.values() for g in d.gamma]
        return (sum(every) / len(every), max(every)) if every else None


def merge(
    adapters: Sequence[PeftAdapter | str | Path],
    method: str = "lego",
    *,
    rank: int | str | None = None,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> MergedAdapter:
    """Merge LoRA adapters of one base model into one.

    Ranks, alphas and rsLoRA may differ (where the method allows it). A module that some adapters
    lack is merged over those that have it. Tensors of `modules_to_save`, such as a classifier, are
    averaged. Write the result with `write_adapter`.

    Args:
        adapters: folders, or adapters that were read.
        method: a key of `METHODS`.
        rank: of the result: a number, ``"max"`` of the ranks, or ``"sum"`` (exact); ``"energy:T"``
            for lego. None: max for lego, exact for flexlora, ensemble and task_arithmetic.
        weights: of the adapters; None: all alike.
        options: of the method, for example those of `fedsim.core.lora.Lego`.

    Raises:
        ConfigError: unknown method or option, or one that does not fit the adapters.
        DataError: a folder is refused, or the adapters belong to different bases.
    """
    if method not in METHODS:
        raise ConfigError(
            f"method = {method} is unknown{did_you_mean(method, METHODS)} "
            f"(known: {', '.join(METHODS)})"
        )
    rule: Any = Lego if method == "lego" else getattr(lora, method)
    _check_options(method, rule, options)
    if rank is not None and method not in RANKED:
        raise ConfigError(f"rank = {rank} cannot be chosen with {method}, only with {RANKED}")
    read = [a if isinstance(a, PeftAdapter) else read_adapter(a) for a in adapters]
    if not read:
        raise ConfigError("adapters = [] must be one adapter or more")
    check_base(read)
    sources = [a.factors for a in read]
    details: dict[str, Merged] = {}
    if method == "lego":
        chosen = Lego(rank="max" if rank is None else rank, **options)
        details = lora.lego(sources, chosen, weights)
        factors: dict[str, Factors] = {name: d.factors for name, d in details.items()}
    else:
        fitted: dict[str, Any] = {"rank": _rank(rank, sources)} if method in RANKED else {}
        factors = rule(sources, weights, **fitted, **options)
    config = {k: v for k, v in read[0].config.items() if k != "modules_to_save"}
    config |= places([a.config for a in read], list(factors))
    kept = sorted({m for a in read for m in a.config.get("modules_to_save") or []})
    config["modules_to_save"] = kept or None
    hashes = {a.base_hash for a in read}
    return MergedAdapter(
        factors,
        config,
        _saved(read, weights),
        hashes.pop() if len(hashes) == 1 else None,
        f"merged by {method}",
        details,
    )


def _check_options(method: str, rule: Callable[..., Any], options: Mapping[str, Any]) -> None:
    defaults = {n: p.default for n, p in signature(rule).parameters.items()}
    for name, value in options.items():
        if name not in METHODS[method]:
            known = ", ".join(METHODS[method]) or "none"
            near = did_you_mean(name, METHODS[method])
            raise ConfigError(f"{method} has no option {name}{near} (known: {known})")
        kind = type(defaults[name])
        if not (type(value) is kind or (kind is float and type(value) is int)):
            raise ConfigError(f"{name} = {shown(value)} must be a {kind.__name__}")


def _rank(rank: int | str | None, sources: Sequence[Mapping[str, Factors]]) -> int | None:
    """A number, or None for all ranks."""
    if rank is None or rank == "sum":
        return None
    if rank == "max":
        return max(f.rank for a in sources for f in a.values())
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank = {rank} must be a number from 1, max or sum")
    return rank


def _saved(read: Sequence[PeftAdapter], weights: Sequence[float] | None) -> dict[str, Tensor]:
    """Means of the tensors that were trained whole."""
    given = list(weights) if weights is not None else [1.0] * len(read)
    means: dict[str, Tensor] = {}
    for name in read[0].saved.keys() | {n for a in read for n in a.saved}:
        owners = [a.source for a in read if name not in a.saved]
        if owners:
            raise DataError(f"{owners[0]} is refused: missing saved tensor {name}")
        tensors = [a.saved[name] for a in read]
        shapes = {tuple(t.shape) for t in tensors}
        if len(shapes) > 1 or not all(t.is_floating_point() for t in tensors):
            raise DataError(f"saved tensor {name} has shapes {sorted(shapes)}; they must be equal")
        total = torch.zeros_like(tensors[0], dtype=torch.float64)
        for tensor, weight in zip(tensors, given, strict=True):
            total.add_(tensor, alpha=weight / sum(given))
        means[name] = total.to(tensors[0].dtype)
    return dict(sorted(means.items()))
