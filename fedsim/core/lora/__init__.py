"""Arithmetic of LoRA adapters: `{module: Factors}`, merged without a network and without peft.

`lego` merges by rank-wise clustering (LoRA-LEGO); `federated` has the rules of the federated peers,
`mergers` the training-free ones. Everything works module by module, so what is in memory besides
the adapters is one module's, and no product ``B @ A`` is ever made dense unless a rule needs it.
"""

from __future__ import annotations

from fedsim.core.lora.factors import Adapter, Factors, compact_svd, compacted, scaling_of, truncated
from fedsim.core.lora.federated import (
    fedex,
    fedit,
    fedsa,
    ffa,
    flexlora,
    flora,
    hetlora,
    rolora,
    trained_factor,
)
from fedsim.core.lora.lego import Lego, Merged, lego
from fedsim.core.lora.mergers import dare, ensemble, task_arithmetic, ties

__all__ = [
    "Adapter",
    "Factors",
    "Lego",
    "Merged",
    "compact_svd",
    "compacted",
    "dare",
    "ensemble",
    "fedex",
    "fedit",
    "fedsa",
    "ffa",
    "flexlora",
    "flora",
    "hetlora",
    "lego",
    "rolora",
    "scaling_of",
    "task_arithmetic",
    "ties",
    "trained_factor",
    "truncated",
]
