"""Which groups a model has that can be pruned, gates to switch them off, and slicing them away."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.errors import ConfigError
from fedsim.core.structure import GATE, Kept, Structure, Structures
from fedsim.models.lora import LoRALinear, is_linear, sizes, transposed
from fedsim.models.text import Block


def structures(module: nn.Module) -> Structures:
    """Heads and channels of a model: our MLPs and GPT, Hugging Face's Llama and BERT families.

    Call it before or after adapters are put in: paths are those of the layers they adapt.

    Raises:
        ConfigError: nothing in it is known to be prunable.
    """
    found: list[Structure] = []
    for layer, (prefix, block) in enumerate(_blocks(module)):
        found += _of_block(module, prefix, block, layer)
    if not found:
        found = list(_of_mlp(module))
    if not found:
        raise ConfigError(
            "model: nothing can be pruned: pruning knows mlp, char_gpt, and Llama- and BERT-like "
            "Hugging Face models"
        )
    paths = {p for s in found for p in (*s.rows, s.columns[0])}
    inner = {p: _inner(module, p) for p in paths}
    if any(transposed(module.get_submodule(p)) for p in inner.values()):
        raise ConfigError("model: layers with transposed weights (GPT-2) cannot be pruned")
    weights = {p: f"{i}.weight" if i else "weight" for p, i in sorted(inner.items())}
    shapes = {p: sizes(module.get_submodule(i))[::-1] for p, i in sorted(inner.items())}
    linear = [m for n, m in module.named_modules() if is_linear(m) and "lora_" not in n]
    return Structures(
        tuple(found),
        weights,
        shapes,
        _scalings(module, paths),
        sum(i * o for i, o in map(sizes, linear)),
    )


def _scalings(module: nn.Module, paths: set[str]) -> dict[str, float]:
    found = {}
    for path in sorted(paths):
        scaling = getattr(module.get_submodule(path), "scaling", None)
        scaling = next(iter(scaling.values()), None) if isinstance(scaling, dict) else scaling
        if scaling is not None:
            found[path] = float(scaling)
    return found


def gated(module: nn.Module) -> nn.Module:
    """Give a model gates, one number for each group: 1 as before, 0 as if it were removed.

    They multiply the inputs of the layer that a structure feeds; nothing else has to know. They
    are buffers that local work does not change (`ModelInfo.still`).

    Args:
        module: changed in place; gets the attribute `structures`.
    """
    found = structures(module)
    module.structures = found  # type: ignore[assignment]
    for s in found.items:
        path, index = s.columns
        layer = module.get_submodule(path)
        layer.register_buffer(GATE, torch.ones(s.groups))
        place = torch.empty(index.numel(), dtype=torch.int64)
        place[index.flatten()] = torch.arange(s.groups).repeat_interleave(index.shape[1])
        layer.register_buffer("gate_of", place, persistent=False)
        layer.still = (*getattr(layer, "still", ()), GATE)  # type: ignore[assignment]
        layer.register_forward_pre_hook(_close)
    return module


def _close(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    gate = layer.gate[layer.gate_of]  # type: ignore[index]
    return (x * gate.to(x.dtype), *inputs[1:])


@torch.no_grad()
def sliced(module: nn.Module, kept: Kept) -> nn.Module:
    """A copy without the groups that are gone, adapters merged into their layers, no gates.

    Smaller matrices, so less memory and arithmetic without sparse kernels; outputs are those of
    the gated model.

    Args:
        module: from `gated`.
        kept: which groups are left.
    """
    found: Structures = module.structures  # type: ignore[assignment]
    small = copy.deepcopy(module)
    rows, columns = found.sides(kept)
    for name, layer in list(small.named_modules()):
        if isinstance(layer, LoRALinear) or (is_linear(layer) and name in found.weights):
            plain = _merged(layer, rows.get(name), columns.get(name))
            parent, _, last = name.rpartition(".")
            setattr(small.get_submodule(parent), last, plain)
    for s in found.items:
        _recount(small, s, int(kept[s.name].sum()))
    del small.structures
    return small


def _merged(layer: nn.Module, rows: Tensor | None, columns: Tensor | None) -> nn.Linear:
    base = layer.base if isinstance(layer, LoRALinear) else layer
    assert isinstance(base, nn.Linear)
    weight, bias = base.weight.detach(), base.bias
    if isinstance(layer, LoRALinear):
        update = layer.lora_B @ layer.lora_A
        weight = weight + layer.scaling * (update if layer.delta is None else update + layer.delta)
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    plain.weight.copy_(weight)
    if bias is not None:
        plain.bias.copy_(bias.detach() if rows is None else bias.detach()[rows])
    return plain.requires_grad_(False)


def _recount(module: nn.Module, structure: Structure, left: int) -> None:
    """Tell an attention how many heads it has now."""
    parent = module.get_submodule(structure.name.rpartition(".")[0])
    if isinstance(parent, Block) and structure.name.endswith(".heads"):
        parent.heads = left
    own: Any = getattr(getattr(parent, "attention", None), "self", None)
    if structure.name.endswith(".heads") and hasattr(own, "num_attention_heads"):
        own.num_attention_heads = left
        own.all_head_size = left * own.attention_head_size


def _blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The transformer blocks of a model, in order."""
    for name, child in module.named_modules():
        attention = getattr(child, "self_attn", None) or getattr(child, "attention", None)
        known = hasattr(attention, "q_proj") or hasattr(attention, "self")
        if isinstance(child, Block) or (known and attention is not child):
            yield name, child


def _of_block(module: nn.Module, prefix: str, block: nn.Module, layer: int) -> list[Structure]:
    before = f"{prefix}." if prefix else ""
    if isinstance(block, Block):
        width = sizes(_plain(block.mix))[0]
        size = width // block.heads
        parts = torch.arange(3 * width).view(3, block.heads, size)
        return [
            _structure(module, f"{before}heads", layer, {f"{before}attend": parts},
                       f"{before}mix", size),
            _channels(module, before, layer, ("expand",), "contract"),
        ]  # fmt: skip
    if hasattr(block, "self_attn"):
        attention: Any = block.self_attn
        size = int(attention.head_dim)
        heads = sizes(_plain(attention.k_proj))[1] // size
        names = {n: f"{before}self_attn.{n}_proj" for n in "qkvo"}
        rows = {
            names[n]: torch.arange(sizes(_plain(getattr(attention, f"{n}_proj")))[1]).view(
                1, heads, -1
            )
            for n in "qkv"
        }
        width = sizes(_plain(attention.o_proj))[0] // heads
        return [
            _structure(module, f"{before}heads", layer, rows, names["o"], width),
            _channels(module, f"{before}mlp.", layer, ("gate_proj", "up_proj"), "down_proj"),
        ]
    inside = block.attention.self  # type: ignore[union-attr]
    heads, size = int(inside.num_attention_heads), int(inside.attention_head_size)  # type: ignore[union-attr,arg-type]
    own = f"{before}attention.self."
    index = torch.arange(heads * size).view(1, heads, size)
    rows = {f"{own}{n}": index for n in ("query", "key", "value")}
    return [
        _structure(module, f"{before}heads", layer, rows, f"{before}attention.output.dense", size),
        _channels(module, before, layer, ("intermediate.dense",), "output.dense"),
    ]


def _of_mlp(module: nn.Module) -> Iterator[Structure]:
    """Hidden units of a chain of linear layers with elementwise functions between them."""
    if not isinstance(module, nn.Sequential):
        return
    linear = [n for n, m in module.named_children() if isinstance(m, LoRALinear) or is_linear(m)]
    for layer, (one, two) in enumerate(pairwise(linear)):
        yield _channels(module, "", layer, (one,), two)


def _channels(
    module: nn.Module, before: str, layer: int, inputs: tuple[str, ...], output: str
) -> Structure:
    count = sizes(_plain(module.get_submodule(f"{before}{output}")))[0]
    rows = {f"{before}{n}": torch.arange(count).view(1, count, 1) for n in inputs}
    name = f"{before}{output}.channels" if not before else f"{before}channels"
    return _structure(module, name, layer, rows, f"{before}{output}", 1)


def _structure(
    module: nn.Module, name: str, layer: int, rows: dict[str, Tensor], output: str, size: int
) -> Structure:
    width = sizes(_plain(module.get_submodule(output)))[0]
    return Structure(name, layer, rows, (output, torch.arange(width).view(-1, size)))


def _plain(layer: nn.Module) -> nn.Module:
    """The linear layer itself, under ours or peft's adapter."""
    base = getattr(layer, "base", None)
    return base if isinstance(base, nn.Module) else getattr(layer, "base_layer", layer)


def _inner(module: nn.Module, path: str) -> str:
    layer = module.get_submodule(path)
    for name in ("base", "base_layer"):
        if isinstance(getattr(layer, name, None), nn.Module):
            return f"{path}.{name}" if path else name
    return path
