"""The pruned models that a run left on its clients, as smaller models of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedsim.config import Experiment, StrategyConfig
from fedsim.core.errors import ConfigError, RunError
from fedsim.core.structure import Structures
from fedsim.models.lora import LoRALinear
from fedsim.models.pruning import sliced
from fedsim.runner import saved_config
from fedsim.runtime.work import Environment

ARTEFACT = "fedspine.json"
"""What a run says of its clients' groups and ranks."""


def client_models(run: str | Path) -> tuple[nn.Module, dict[int, dict[str, Any]]]:
    """The model of a run with its final adapter, and what each client has left.

    Args:
        run: folder of a finished run that pruned.

    Raises:
        RunError: there is no such run, or it pruned nothing.
    """
    path = Path(run)
    config = saved_config(path)
    if config is None:
        raise RunError(f"{path} is no run folder")
    try:
        left = json.loads((path / "artefacts" / ARTEFACT).read_text())
        state = load_file(path / "model.safetensors")
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise RunError(f"{path} is no finished run that pruned: it has no {missing}") from None
    experiment = Experiment.model_validate(config["experiment"])
    entry = StrategyConfig.model_validate(config["strategy"])
    module = Environment.of(experiment, int(config["seed"]), entry).model.module
    own = module.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return module.eval(), {int(client): facts for client, facts in left.items()}


@torch.no_grad()
def client_model(module: nn.Module, facts: dict[str, Any]) -> nn.Module:
    """One client's model: its groups sliced out, its ranks of the adapter merged.

    Args:
        module: from `client_models`; not changed.
        facts: of the client.
    """
    found: Structures = module.structures  # type: ignore[assignment]
    kept = {}
    for s in found.items:
        kept[s.name] = torch.zeros(s.groups, dtype=torch.bool)
        kept[s.name][torch.tensor(facts["kept"][s.name])] = True
    whole = {n: m.lora_B.clone() for n, m in module.named_modules() if isinstance(m, LoRALinear)}
    try:
        for name in whole:
            module.get_submodule(name).lora_B[:, facts["rank"] :] = 0.0  # type: ignore[operator]
        return sliced(module, kept)
    finally:
        for name, factor in whole.items():
            module.get_submodule(name).lora_B.copy_(factor)  # type: ignore[operator]


def export(run: str | Path, out: str | Path, clients: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Write clients' models: ``client-N.safetensors``, and ``client-N.json`` with what is left.

    Args:
        run: folder of a finished run that pruned.
        out: folder, made if it is not there.
        clients: partition numbers; none: all that took part.

    Returns:
        for each client its number, weights, share of the groups that is gone, and file.

    Raises:
        ConfigError: a client did not take part.
        RunError: see `client_models`.
    """
    module, left = client_models(run)
    if unknown := sorted(set(clients) - set(left)):
        known = ", ".join(map(str, sorted(left)))
        raise ConfigError(f"client = {unknown[0]} did not take part in {run} (did: {known})")
    folder, rows = Path(out), []
    folder.mkdir(parents=True, exist_ok=True)
    for client in clients or sorted(left):
        small, file = client_model(module, left[client]), folder / f"client-{client}.safetensors"
        state = {n: t.contiguous().clone() for n, t in small.state_dict().items()}
        save_file(state, file, {"format": "pt"})
        facts = {"run": str(run), "client": client, **left[client]}
        file.with_suffix(".json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        weights = sum(p.numel() for p in small.parameters())
        pruned = float(left[client]["pruned"])
        rows.append({"client": client, "weights": weights, "pruned": pruned, "file": str(file)})
    return rows
