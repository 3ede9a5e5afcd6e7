"""LoRA on the small models: a frozen base that never travels, and trainable low-rank updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.errors import ConfigError, require
from fedsim.core.text import did_you_mean
from fedsim.data.arguments import call
from fedsim.data.federated import FederatedData
from fedsim.registry import resolve


class LoRALinear(nn.Module):
    """A frozen linear layer and its update: ``W x + bias + scaling * B (A x)``.

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022. A starts uniform
    (as peft's), B at zero.

    Args:
        base: the layer; it is frozen.
        rank: of the update.
        scaling: alpha / rank.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), scaling
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        update: Tensor = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return self.base(x) + self.scaling * update


def adapt(
    module: nn.Module, rank: int, scaling: float, targets: Sequence[str] = (), head: bool = False
) -> nn.Module:
    """Freeze a module and give its linear layers low-rank updates.

    Args:
        module: changed in place, unless it is a linear layer itself.
        rank: of every update.
        scaling: of every update.
        targets: names of layers, or their last parts; none means every linear layer.
        head: the last linear layer is trained whole instead.

    Raises:
        ConfigError: no linear layer, or a target that is none.
    """
    linear = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ConfigError("model = lora needs a base with linear layers")
    for target in targets:
        if not any(_named(name, target) for name in linear):
            raise ConfigError(
                f"model.targets = {target} is no linear layer of the base"
                f"{did_you_mean(target, linear)} (there are: {', '.join(linear)})"
            )
    module.requires_grad_(False)
    for name in linear:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if head and name == linear[-1]:
            layer.requires_grad_(True)
        elif not targets or any(_named(name, t) for t in targets):
            if not name:
                return LoRALinear(layer, rank, scaling)
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, LoRALinear(layer, rank, scaling))
    return module


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def lora(
    data: FederatedData,
    seed: int,
    base: str = "mlp",
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = (),
    head: bool = False,
    base_params: dict[str, Any] | None = None,
) -> nn.Module:
    """LoRA on the linear layers of another model, whose own weights are frozen.

    The base has the weights of the run's seed, and only the updates travel.

    Args:
        data: passed on to the base.
        seed: passed on to the base.
        base: name of the model, such as mlp or char_gpt.
        rank: of the updates; the largest, where a strategy gives clients ranks of their own.
        alpha: the updates are multiplied by alpha / rank, the same for every client: a client of
            lower rank has a lower alpha in proportion.
        targets: names of layers, or last parts of names; none means every linear layer.
        head: train the last linear layer whole.
        base_params: parameters of the base.
    """
    require(rank >= 1, "model.rank", rank, "1 or above")
    require(alpha > 0, "model.alpha", alpha, "above 0")
    module = call(
        resolve("models", base), "model.base_params", base_params or {}, data=data, seed=seed,
        input_shape=data.input_shape, num_outputs=data.num_outputs,
    )  # fmt: skip
    return adapt(module, rank, alpha / rank, targets, head)
