"""LoRA models and their trained state as adapters that peft loads."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.lora import Factors, compacted
from fedsim.core.records import FlatRecord, Layout
from fedsim.models.adapters import PeftAdapter, write_adapter
from fedsim.models.lora import LoRALinear, transposed

NEGLIGIBLE = 1e-7
"""Singular values of a merged update that are kept, relative to the largest."""


def plain_name(name: str) -> str:
    """The name that a base weight of a wrapped model has in the base model itself."""
    name = name.removeprefix("inner.").removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".base.", ".")


def base_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a model without its low-rank updates, by their names in the base itself."""
    return {plain_name(n): p.detach() for n, p in module.named_parameters() if "lora_" not in n}


def base_digest(module: nn.Module) -> str:
    """Digest of the base's weights: names, shapes, types and bits."""
    total = hashlib.sha256()
    for name, tensor in sorted(base_weights(module).items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.contiguous().cpu()
        total.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def wrapped(module: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, LoRALinear)}


def to_adapter(module: nn.Module, record: FlatRecord, base: str | None = None) -> PeftAdapter:
    """A trained state as an adapter of the base model.

    What was merged into the base is part of the adapter, in as many ranks as it takes; ranks that
    are zero in both factors are left out.

    Args:
        module: the model (`fedsim.models.lora.adapt`) as it was built.
        record: the trained state.
        base: id or folder of the base model, where it has one.
    """
    state, layers = record.state(), wrapped(module)
    factors: dict[str, Factors] = {}
    for name, layer in layers.items():
        before = f"{name}." if name else ""
        found = Factors(state[f"{before}lora_A"], state[f"{before}lora_B"], layer.scaling)
        delta = state.get(f"{before}delta")
        if delta is not None and bool(delta.any()):
            found = _with_delta(found, delta)
        factors[plain_name(name) or name] = _trimmed(found)
    used = {f"{n}." if n else "" for n in layers}
    heads = {
        plain_name(n): t
        for n, t in state.items()
        if n in record.layout.trainable and not any(n.startswith(u) for u in used)
    }
    saved = sorted({n.rpartition(".")[0] for n in heads})
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM" if base is not None else None,
        "target_modules": sorted(factors),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(transposed(m.base) for m in layers.values()),
    }
    return PeftAdapter(factors, config, heads, base_digest(module))


def _with_delta(factors: Factors, delta: Tensor) -> Factors:
    """An adapter and what was merged into the base, as one."""
    s = factors.scaling
    u, values, vt = torch.linalg.svd(delta.double() * s, full_matrices=False)
    kept = int((values > NEGLIGIBLE * values[0]).sum())
    root = values[:kept].sqrt()
    a = torch.cat([factors.a.double() * s, root[:, None] * vt[:kept]])
    b = torch.cat([factors.b.double(), u[:, :kept] * root], 1)
    whole = compacted(_trimmed(Factors(a, b)))
    return Factors(whole.a.to(delta.dtype), whole.b.to(delta.dtype))


def _trimmed(factors: Factors) -> Factors:
    """Without ranks that contribute nothing; one is left."""
    alive = factors.a.any(1) & factors.b.any(0)
    if bool(alive.all()):
        return factors
    kept = alive.nonzero().flatten() if bool(alive.any()) else torch.zeros(1, dtype=torch.int64)
    return Factors(factors.a[kept], factors.b[:, kept], factors.scaling)


def save_adapter(
    folder: Path, module: nn.Module, models: Mapping[str, Mapping[str, Tensor]], layout: Layout,
    base: str | None,
) -> Path | None:  # fmt: skip
    """Write the adapter that a run trained; None: it trained none that is whole.

    Args:
        folder: which it replaces.
        module: the model as it was built.
        models: the run's final models by name; of several, the one with the most ranks counts.
        layout: of the model.
        base: id or folder of the base model, where it has one.
    """
    whole = [state for _, state in sorted(models.items()) if set(state) >= set(layout.names)]
    if not wrapped(module) or not whole:
        return None
    adapters = [
        to_adapter(
            module,
            FlatRecord(layout, layout.flatten(state), {n: state[n] for n in layout.beside}),
            base,
        )
        for state in whole
    ]
    shutil.rmtree(folder, ignore_errors=True)
    ranks = [sum(f.rank for f in a.factors.values()) for a in adapters]
    return write_adapter(adapters[ranks.index(max(ranks))], folder)


def unwrap(module: nn.Module) -> nn.Module:
    """The base model alone; the given one is taken apart."""
    if isinstance(module, LoRALinear):
        return module.base
    for name, layer in wrapped(module).items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, layer.base)
    inner = getattr(module, "inner", None)
    if inner is not None and hasattr(inner, "unload"):
        module.inner = inner.unload()
    return module


def source_of(model: Mapping[str, Any]) -> str | None:
    """Where the base of a configured model comes from: a path or id; None: built by us."""
    params: Mapping[str, Any] = model.get("params") or {}
    nested: Mapping[str, Any] = params.get("base_params") or {}
    path = params.get("path") or nested.get("path")
    return path if isinstance(path, str) else None
