"""LoRA on the small models: a frozen base that never travels, and trainable low-rank updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.errors import ConfigError, require
from fedsim.core.text import did_you_mean, tame
from fedsim.data.arguments import call
from fedsim.data.federated import FederatedData


class LoRALinear(nn.Module):
    """A frozen linear layer and its update: ``W x + bias + scaling * (B A + D) x``.

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022. A starts uniform
    (as peft's), B at zero. D is what a server has merged into the layer so far; it starts at zero
    and is not trained.

    Args:
        base: the layer, an `nn.Linear` or transformers' `Conv1D`; it is frozen.
        rank: of the update.
        scaling: alpha / rank.
        delta: whether there is a D.
    """

    still = ("delta", "merged")
    """What only a server changes: D, and the number of the last merge in it."""

    delta: Tensor | None
    merged: Tensor | None

    def __init__(self, base: nn.Module, rank: int, scaling: float, delta: bool = False) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), scaling
        width, out = sizes(base)
        self.lora_A = nn.Parameter(torch.empty(rank, width))
        self.lora_B = nn.Parameter(torch.zeros(out, rank))
        self.register_buffer("delta", torch.zeros(out, width) if delta else None)
        self.register_buffer("merged", torch.zeros(1) if delta else None)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        known: Tensor = self.base(x)
        x = x.to(self.lora_A.dtype)
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)
        if self.delta is not None:
            update = update + F.linear(x, self.delta)
        return known + (self.scaling * update).to(known.dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is a matrix product that can have an update."""
    return isinstance(module, nn.Linear) or transposed(module)


def transposed(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`: a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    width, out = layer.get_parameter("weight").shape
    return width, out


def adapt(
    module: nn.Module,
    rank: int,
    scaling: float,
    targets: Sequence[str] = (),
    head: bool = False,
    delta: bool = False,
) -> nn.Module:
    """Freeze a module and give its linear layers low-rank updates.

    Args:
        module: changed in place, unless it is a linear layer itself.
        rank: of every update.
        scaling: of every update.
        targets: names of layers, or their last parts; none means every linear layer.
        head: the last linear layer is trained whole instead.
        delta: layers can have updates merged into them; see `LoRALinear`.

    Raises:
        ConfigError: no linear layer, or a target that is none.
    """
    linear = [name for name, m in module.named_modules() if is_linear(m)]
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
        if head and name == linear[-1]:
            layer.requires_grad_(True)
        elif not targets or any(_named(name, t) for t in targets):
            if not name:
                return LoRALinear(layer, rank, scaling, delta)
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, LoRALinear(layer, rank, scaling, delta))
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
    delta: bool = False,
    weights: str | None = None,
    prunable: bool = False,
    base_params: dict[str, Any] | None = None,
) -> nn.Module:
    """LoRA on the linear layers of another model, whose own weights are frozen.

    The base has the weights of the run's seed, or those of a run that trained it whole, and only
    the updates travel.

    Args:
        data: passed on to the base.
        seed: passed on to the base.
        base: name of the model, such as mlp or char_gpt.
        rank: of the updates; the largest, where a strategy gives clients ranks of their own.
        alpha: the updates are multiplied by alpha / rank, the same for every client: a client of
            lower rank has a lower alpha in proportion.
        targets: names of layers, or last parts of names; none means every linear layer.
        head: train the last linear layer whole.
        delta: the strategy may merge updates into the base (flora, fedex_lora, two modes of
            lora_lego). Other LoRA strategies leave that out of their messages.
        weights: folder of a finished run of that base, or a ``.safetensors`` file, whose weights
            the base begins with; ``{seed}`` in it stands for the run's seed. None: those of the
            seed.
        prunable: heads and channels can be removed (fedspine).
        base_params: parameters of the base.

    Raises:
        ConfigError: a value is not allowed, or the weights are not those of such a base.
    """
    require(rank >= 1, "model.rank", rank, "1 or above")
    require(alpha > 0, "model.alpha", alpha, "above 0")
    module = call(
        "models", base, "model.base_params", base_params or {}, data=data, seed=seed,
        input_shape=data.input_shape, num_outputs=data.num_outputs,
    )  # fmt: skip
    if weights is not None:
        load_weights(module, weights.replace("{seed}", str(seed)))
    adapted = adapt(module, rank, alpha / rank, targets, head, delta)
    if prunable:
        from fedsim.models.pruning import gated

        gated(adapted)
    return adapted


def load_weights(module: nn.Module, place: str) -> None:
    """Give a module the weights of a run.

    Args:
        module: changed in place.
        place: the run's folder, or a ``.safetensors`` file.

    Raises:
        ConfigError: there are none, or they are another model's.
    """
    path = Path(place).expanduser()
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"model.weights = {place!r} cannot be read ({tame(str(error))}); it must be a finished "
            "run's folder or a .safetensors file"
        ) from None
    own = module.state_dict()
    wrong = {n for n, t in own.items() if n not in state or state[n].shape != t.shape}
    wrong |= set(state) - set(own)
    if wrong:
        raise ConfigError(
            f"model.weights = {place!r} are those of another model: {', '.join(sorted(wrong)[:3])} "
            "differ; model.base_params and data must be as in that run"
        )
    module.load_state_dict(state)
