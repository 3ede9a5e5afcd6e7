"""LoRA adapters in folders as peft writes them: read with suspicion, written so that peft reads.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. What is read may come from
anybody: nothing is unpickled, every name, shape and number is checked, and a folder that is not
exactly an adapter is refused with a reason.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedsim.core.errors import DataError
from fedsim.core.lora import Factors, scaling_of
from fedsim.core.text import shown, tame

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST = 2**16
"""No adapter has that rank, nor such an alpha; more is an attack on memory or on the weights."""
_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)
_PATTERN = re.compile(r"[\w.\\*^$|()\[\]?:+-]{1,300}", re.ASCII)
_BAR = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "megatron_config",
)  # fmt: skip
_BENDING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base weights: such adapters do not belong to the plain base."""
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A LoRA adapter outside of any model.

    Attributes:
        factors: of each adapted module, by its path in the base model.
        config: the rest of peft's configuration (base model, task, target modules).
        saved: other tensors of the model that were trained whole (`modules_to_save`), by path.
        base_hash: digest of the base weights, where the writer left one.
        source: where it was read; for messages.
    """

    factors: Mapping[str, Factors]
    config: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    base_hash: str | None = None
    source: str = "adapter"


def read_adapter(folder: str | Path, like: PeftAdapter | None = None) -> PeftAdapter:
    """Read a folder.

    Args:
        folder: that `PeftModel.save_pretrained` or `write_adapter` wrote, or a run that has one.
        like: if given, modules, shapes, ranks, scalings and base must be as there.

    Raises:
        DataError: it is not exactly a LoRA adapter, or not like that one; one line says why.
    """
    path = Path(folder)
    where = tame(str(path))
    if not (path / CONFIG).exists() and (path / "adapter" / CONFIG).exists():
        path = path / "adapter"
    config = _config(path, where)
    tensors, base_hash = _tensors(path, where)
    pairs: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            saved[_saved_name(key, config, where)] = tensor
            continue
        module, letter = match.groups()
        if not _PATH.fullmatch(module):
            raise _refusal(where, f"key {shown(key)} names no module")
        pairs.setdefault(module, {})[letter] = tensor
    if not pairs:
        raise _refusal(where, "it holds no LoRA factors")
    factors = {m: _factors(m, pair, config, where) for m, pair in pairs.items()}
    found = PeftAdapter(factors, config, saved, base_hash, where)
    if like is not None:
        check_like(found, like)
    return found


def check_like(adapter: PeftAdapter, like: PeftAdapter) -> None:
    """Whether one adapter can stand in for another.

    Raises:
        DataError: modules, shapes, ranks, scalings, saved tensors or base differ.
    """
    where = adapter.source
    for name, mine, other in (
        ("modules", adapter.factors, like.factors), ("saved tensors", adapter.saved, like.saved)
    ):  # fmt: skip
        if unknown := sorted(set(mine) - set(other)):
            raise _refusal(where, f"unexpected {name} {shown(unknown)}")
        if missing := sorted(set(other) - set(mine)):
            raise _refusal(where, f"missing {name} {shown(missing)}")
    for module, f in adapter.factors.items():
        wanted = like.factors[module]
        for what, is_, needed in (
            ("rank", f.rank, wanted.rank),
            ("A", tuple(f.a.shape), tuple(wanted.a.shape)),
            ("B", tuple(f.b.shape), tuple(wanted.b.shape)),
            ("scaling (alpha over rank)", f.scaling, wanted.scaling),
        ):
            if is_ != needed:
                raise _refusal(where, f"{module}: {what} is {is_}, {needed} is needed")
    for name, tensor in adapter.saved.items():
        if tensor.shape != like.saved[name].shape:
            raise _refusal(where, f"{name}: shape {tuple(tensor.shape)} differs")
    check_base([adapter, like])


def check_base(adapters: Sequence[PeftAdapter]) -> None:
    """Whether adapters belong to one base model, as far as they say.

    Raises:
        DataError: two name different bases, or different digests of its weights.
    """
    for what, values in (
        ("base model", [a.config.get("base_model_name_or_path") for a in adapters]),
        ("base weights (hash)", [a.base_hash for a in adapters]),
        ("fan_in_fan_out", [bool(a.config.get("fan_in_fan_out")) for a in adapters]),
    ):
        said = [(a.source, v) for a, v in zip(adapters, values, strict=True) if v is not None]
        for source, value in said[1:]:
            if value != said[0][1]:
                detail = f"its {what} is {shown(value)}; {said[0][0]} has {shown(said[0][1])}"
                raise _refusal(source, detail)


def write_adapter(adapter: PeftAdapter, folder: str | Path) -> Path:
    """Write a folder that `PeftModel.from_pretrained` reads.

    Scalings are written as ``alpha = scaling * rank`` without rsLoRA. Modules whose rank or
    scaling is not the commonest go into `rank_pattern` and, always with it, `alpha_pattern`,
    under their whole path, anchored and escaped, so that no other module matches.

    Raises:
        DataError: the folder holds an adapter already.
    """
    path = Path(folder)
    if (path / CONFIG).exists() or (path / WEIGHTS).exists():
        raise DataError(f"{tame(str(path))} holds an adapter already; choose another folder")
    path.mkdir(parents=True, exist_ok=True)
    kinds = Counter((f.rank, f.scaling) for f in adapter.factors.values())
    rank, scaling = kinds.most_common(1)[0][0]
    special = {
        m: f for m, f in sorted(adapter.factors.items()) if (f.rank, f.scaling) != (rank, scaling)
    }
    config = {
        **adapter.config,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(scaling * rank),
        "use_rslora": False,
        "rank_pattern": {_exactly(m): f.rank for m, f in special.items()},
        "alpha_pattern": {_exactly(m): _number(f.scaling * f.rank) for m, f in special.items()},
        "init_lora_weights": True,
        "inference_mode": True,
        "bias": "none",
    }
    if config.get("target_modules") is None:
        config["target_modules"] = sorted(adapter.factors)
    tensors = {
        f"{PREFIX}{m}.lora_{letter}.weight": t.detach().contiguous().clone()
        for m, f in adapter.factors.items()
        for letter, t in (("A", f.a), ("B", f.b))
    }
    tensors |= {
        f"{PREFIX}{name}": t.detach().contiguous().clone() for name, t in adapter.saved.items()
    }
    metadata = {"format": "pt"} | ({"base_hash": adapter.base_hash} if adapter.base_hash else {})
    (path / WEIGHTS).write_bytes(_in_order(save(tensors, metadata)))
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes it in any order."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def places(configs: Sequence[Mapping[str, Any]], modules: Sequence[str]) -> dict[str, Any]:
    """Where a merged adapter sits: as its sources say if they agree, else module by module."""
    said = [{k: _plain(c.get(k)) for k in _PLACES} for c in configs]
    if all(s == said[0] for s in said) and said[0]["target_modules"] is not None:
        return said[0]
    return {**dict.fromkeys(_PLACES), "target_modules": sorted(modules)}


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (list, set, tuple)) else value


def _refusal(where: str, reason: str) -> DataError:
    return DataError(f"{where} is refused: {reason}")


def _config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _refusal(where, f"it has no {CONFIG}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(where, f"{CONFIG} cannot be read: {tame(str(error))}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise _refusal(where, f"peft_type is {shown(kind)}, LORA is needed")
    for name in _BAR:
        if config.get(name):
            raise _refusal(where, f"{name} = {shown(config[name])} is not supported")
    if config.get("bias", "none") != "none":
        raise _refusal(where, f"bias = {shown(config['bias'])} is not supported, only none")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BENDING):
        raise _refusal(where, f"init_lora_weights = {shown(start)} changes the base weights")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(s, str) for s in saved):
        raise _refusal(where, f"modules_to_save = {shown(saved)} is no list of names")
    if not isinstance(config.get("use_rslora", False), bool):
        raise _refusal(where, f"use_rslora = {shown(config['use_rslora'])} is no boolean")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise _refusal(where, f"{name} = {shown(patterns)} is no table")
        for pattern in patterns:
            _safe_pattern(pattern, name, where)
    return config


def _safe_pattern(pattern: str, name: str, where: str) -> None:
    """Refuse expressions that could take for ever to match."""
    sound = _PATTERN.fullmatch(pattern) and pattern.count("*") + pattern.count("+") <= 3
    if not sound or re.search(r"[*+?]\)[*+?]|\)[*+]", pattern):
        raise _refusal(where, f"{name} holds the pattern {shown(pattern)}, which is not plain")
    try:
        re.compile(pattern)
    except re.error:
        raise _refusal(where, f"{name} holds the pattern {shown(pattern)}, not valid") from None


def _tensors(path: Path, where: str) -> tuple[dict[str, Tensor], str | None]:
    file = path / WEIGHTS
    if not file.is_file():
        pickled = (path / "adapter_model.bin").exists()
        more = "; adapter_model.bin is a pickle, which may run code and is not read"
        raise _refusal(where, f"it has no {WEIGHTS}{more if pickled else ''}")
    try:
        with safetensors.safe_open(file, "pt") as opened:
            base_hash = (opened.metadata() or {}).get("base_hash")
        tensors = load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _refusal(where, f"{WEIGHTS} cannot be read: {tame(str(error))}") from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _refusal(where, f"{shown(key)} holds NaN or infinity")
    return tensors, base_hash


def _saved_name(key: str, config: Mapping[str, Any], where: str) -> str:
    """The path of a tensor that is no LoRA factor, if it is one of `modules_to_save`."""
    name = key.removeprefix(PREFIX)
    if "lora_embedding" in key:
        raise _refusal(where, f"key {shown(key)}: LoRA of embeddings is not supported")
    if name == key or not _PATH.fullmatch(name) or "lora_" in name:
        raise _refusal(where, f"unexpected key {shown(key)}")
    if not set(name.split(".")[:-1]) & set(config.get("modules_to_save") or []):
        raise _refusal(where, f"key {shown(key)} names a weight of the base model")
    return name


def _factors(
    module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any], where: str
) -> Factors:
    for letter in "AB":
        if letter not in pair:
            raise _refusal(where, f"missing key {PREFIX}{module}.lora_{letter}.weight")
    if not _targeted(module, config, where):
        raise _refusal(where, f"module {module} is not among the target_modules")
    rank = _positive(config, "rank_pattern", "r", module, where)
    alpha = _positive(config, "alpha_pattern", "lora_alpha", module, where)
    if rank != int(rank):
        raise _refusal(where, f"{module}: rank = {rank} is no whole number")
    rank, a, b = int(rank), pair["A"], pair["B"]
    if not (a.dim() == b.dim() == 2 and a.is_floating_point() and b.is_floating_point()):
        raise _refusal(where, f"{module}: A and B must be matrices of floating-point numbers")
    if (a.shape[0], b.shape[1]) != (rank, rank):
        shapes = f"A has shape {tuple(a.shape)}, B {tuple(b.shape)}"
        why = "A and B are swapped" if (a.shape[1], b.shape[0]) == (rank, rank) else "wrong rank"
        needed = f"rank {rank} needs [{rank}, in] and [out, {rank}]"
        raise _refusal(where, f"{module}: {why}: {shapes}; {needed}")
    return Factors(a, b, scaling_of(alpha, rank, bool(config.get("use_rslora"))))


def _positive(
    config: Mapping[str, Any], patterns: str, default: str, module: str, where: str
) -> float:
    """The module's own number by peft's rule (first pattern that matches), else the common one."""
    value = config.get(default)
    for pattern, own in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            value = own
            break
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not 0 < value <= LARGEST:  # type: ignore[arg-type,operator]
        raise _refusal(
            where, f"{module}: {default} = {shown(value)} must be above 0, at most {LARGEST}"
        )
    return float(value)  # type: ignore[arg-type]


def _targeted(module: str, config: Mapping[str, Any], where: str) -> bool:
    """Whether `target_modules` names the module."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        if targets == "all-linear":
            return True
        _safe_pattern(targets, "target_modules", where)
        return re.fullmatch(targets, module) is not None
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise _refusal(where, f"target_modules = {shown(targets)} is no list of names")
    return any(module == t or module.endswith(f".{t}") for t in targets)


def _exactly(module: str) -> str:
    """A pattern that peft matches to this module and to no other."""
    return f"^{re.escape(module)}"


def _number(value: float) -> float | int:
    """An int where it is one: peft annotates alpha as int."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) else value
