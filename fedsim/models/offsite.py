"""Offsite tuning: clients get the outer layers of a model and a thinned middle, not the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.errors import ConfigError, DataError, require
from fedsim.core.rng import SERVER, isolated, key
from fedsim.data.arguments import call
from fedsim.data.federated import FederatedData
from fedsim.registry import resolve


def blocks_of(module: nn.Module) -> tuple[str, nn.Module]:
    """Name and container of a model's layers: the longest list of modules of one class.

    Raises:
        ConfigError: there is none.
    """
    found = [
        (len(child), name, child)
        for name, child in module.named_modules()
        if isinstance(child, (nn.ModuleList, nn.Sequential))
        and len(child) > 1
        and len({type(layer) for layer in child}) == 1
    ]
    if not found:
        raise ConfigError("model = offsite needs a base with a list of equal layers")
    _, name, container = max(found, key=lambda f: f[0])
    return name, container


def kept_layers(layers: int, lower: int, upper: int, drop: float) -> list[int]:
    """Numbers of the layers that an emulator has.

    The first `lower` and the last `upper` are all there; of the n between them
    ``n' = round(n (1 - drop))`` (at least 1), at places ``int(i (n - 1) / (n' - 1))``, so that the
    first and the last of them are among them.

    Args:
        layers: of the model.
        lower: trained layers at the input.
        upper: trained layers at the output.
        drop: share of the middle that is left out.

    Raises:
        ConfigError: a number is not possible.
    """
    require(lower >= 1, "model.lower", lower, "1 or above")
    require(upper >= 1, "model.upper", upper, "1 or above")
    require(0 <= drop < 1, "model.drop", drop, "from 0, below 1")
    n = layers - lower - upper
    require(n >= 1, "model.lower + model.upper", lower + upper, f"at most {layers - 1}")
    few = max(1, round(n * (1 - drop)))
    middle = [int(i * (n - 1) / (few - 1)) for i in range(few)] if few > 1 else [0]
    outer = range(layers - upper, layers)
    return [*range(lower), *(lower + m for m in middle), *outer]


class Emulator(nn.Module):
    """A thinned model whose outer layers are trained.

    Xiao et al., *Offsite-Tuning: Transfer Learning without Full Model*, 2023 (arXiv 2302.04870),
    with uniform layer dropping; the distillation of the middle is left out. Entries keep the names
    that they have in the emulator; `to_full` says, by name, which of the whole model they are.

    Args:
        inner: the whole model; it is thinned in place.
        lower: see `kept_layers`.
        upper: see `kept_layers`.
        drop: see `kept_layers`.

    Attributes:
        layers: numbers of the layers that are left.
    """

    def __init__(self, inner: nn.Module, lower: int, upper: int, drop: float) -> None:
        super().__init__()
        self._where, container = blocks_of(inner)
        every = list(container.children())
        self.layers = kept_layers(len(every), lower, upper, drop)
        left = [every[number] for number in self.layers]
        listed = isinstance(container, nn.ModuleList)
        thinned: nn.Module = nn.ModuleList(left) if listed else nn.Sequential(*left)
        parent, _, last = self._where.rpartition(".")
        setattr(inner.get_submodule(parent), last, thinned)
        inner.requires_grad_(False)
        for place in (*range(lower), *range(len(self.layers) - upper, len(self.layers))):
            left[place].requires_grad_(True)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """As the whole model."""
        out: Tensor = self.inner(x)
        return out

    def full_name(self, name: str) -> str:
        """The name that an entry has in the whole model."""
        inner, start = name.removeprefix("inner."), f"{self._where}."
        if not inner.startswith(start):
            return inner
        place, _, rest = inner.removeprefix(start).partition(".")
        return f"{start}{self.layers[int(place)]}.{rest}"

    def to_full(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Trained entries under their names in the whole model.

        Args:
            state: all trained entries of the emulator, by name.

        Raises:
            DataError: entries are missing or unknown.
        """
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        if set(state) != trained:
            wrong: Sequence[str] = sorted(set(state) ^ trained)
            raise DataError(f"these are not the emulator's trained entries: {', '.join(wrong[:3])}")
        return {self.full_name(n): t for n, t in state.items()}


@torch.no_grad()
def plug_in(full: nn.Module, emulator: Emulator, state: Mapping[str, Tensor]) -> nn.Module:
    """Put what clients trained on an emulator into the whole model, in place, by name.

    Args:
        full: the whole model.
        emulator: on which was trained.
        state: its trained entries.

    Raises:
        DataError: entries are missing, unknown, or of other shapes.
    """
    named, own = emulator.to_full(state), dict(full.named_parameters())
    wrong = [n for n, t in named.items() if n not in own or own[n].shape != t.shape]
    if wrong:
        raise DataError(f"the whole model has no such entry: {', '.join(sorted(wrong)[:3])}")
    for name, tensor in named.items():
        own[name].copy_(tensor)
    return full


def offsite(
    data: FederatedData,
    seed: int,
    base: str = "char_gpt",
    lower: int = 1,
    upper: int = 1,
    drop: float = 0.5,
    base_params: dict[str, Any] | None = None,
) -> Emulator:
    """The emulator of another model for offsite tuning: outer layers trained, middle thinned.

    With ``drop = 0`` it is the model itself. Embedding and head are frozen.

    Args:
        data: passed on to the base.
        seed: passed on to the base; its weights are those of the base in any other run.
        base: name of the model, such as char_gpt or hf_causal_lm.
        lower: trained layers at the input.
        upper: trained layers at the output.
        drop: share of the layers between them that is left out.
        base_params: parameters of the base.
    """
    with isolated(key(seed, 0, SERVER, "model")):
        inner = call(
            resolve("models", base), "model.base_params", base_params or {}, data=data, seed=seed,
            input_shape=data.input_shape, num_outputs=data.num_outputs,
        )  # fmt: skip
    return Emulator(inner, lower, upper, drop)
