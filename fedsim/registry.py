"""Names of components, as ``"module:attribute"`` strings that are imported when they are used.

A name is looked up among the built-in ones, then among the plug-ins that installed packages
declare as entry points of the group ``fedsim.<kind>``; ``"package.module:attribute"`` is taken as
it stands.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedsim.core.errors import ConfigError
from fedsim.core.text import did_you_mean, shown, tame

STRATEGIES = {
    "fedavg": "strategies.fedavg:FedAvg",
    "fedprox": "strategies.fedprox:FedProx",
    "scaffold": "strategies.scaffold:Scaffold",
    "fedld": "strategies.fedld:FedLD",
    "fedld_official": "strategies.fedld:FedLDOfficial",
    "fedsam": "strategies.fedsam:FedSAM",
    "dfedavg": "strategies.dfedavg:DFedAvg",
    "dfedavgm": "strategies.dfedavg:DFedAvgM",
    "dpsgd": "strategies.dfedavg:DPSGD",
    "dfedsam": "strategies.dfedsam:DFedSAM",
    "dfedsam_mgs": "strategies.dfedsam:DFedSAMMGS",
    "gossip_relay": "strategies.relay:GossipRelay",
    "dispfl": "strategies.dispfl:DisPFL",
    "kafal": "strategies.kafal:KAFAL",
    "active_learning": "strategies.active_learning:ActiveLearning",
    "knfu": "strategies.knfu:KnFu",
    "fedmd": "strategies.fedmd:FedMD",
    "selective_fd": "strategies.fedmd:SelectiveFD",
    "local_only": "strategies.fedmd:LocalOnly",
    "feddf": "strategies.feddf:FedDF",
    "fedap": "strategies.fedap:FedAP",
    "fedap_official": "strategies.fedap:FedAPOfficial",
    "flhc": "strategies.flhc:FLHC",
    "cfl": "strategies.cfl:CFL",
    "ifca": "strategies.ifca:IFCA",
    "fedclust": "strategies.fedclust:FedClust",
    "pacfl": "strategies.pacfl:PACFL",
    "local": "strategies.local:Local",
    "ditto": "strategies.ditto:Ditto",
    "perfedavg": "strategies.perfedavg:PerFedAvg",
    "fedbn": "strategies.fedbn:FedBN",
    "fedper": "strategies.fedper:FedPer",
    "fedrep": "strategies.fedrep:FedRep",
    "apfl": "strategies.apfl:APFL",
    "pfedme": "strategies.pfedme:PFedMe",
    "fedkseed": "strategies.fedkseed:FedKSeed",
    "fedkseed_pro": "strategies.fedkseed:FedKSeedPro",
    "ferret": "strategies.ferret:Ferret",
    "fedzo": "strategies.fedzo:FedZO",
    "fedit": "strategies.fedit:FedIT",
    "flora": "strategies.flora:FLoRA",
    "flexlora": "strategies.flexlora:FlexLoRA",
    "fedex_lora": "strategies.fedex_lora:FedExLoRA",
    "hetlora": "strategies.hetlora:HetLoRA",
    "ffa_lora": "strategies.ffa_lora:FFALoRA",
    "rolora": "strategies.rolora:RoLoRA",
    "fedsa_lora": "strategies.fedsa_lora:FedSALoRA",
    "lora_lego": "strategies.lora_lego:LoRALego",
    "fedspine": "strategies.fedspine:FedSpine",
    "fedavgm": "strategies.flower:FedAvgM",
    "fedadam": "strategies.flower:FedAdam",
    "fedyogi": "strategies.flower:FedYogi",
    "fedadagrad": "strategies.flower:FedAdagrad",
    "fedmedian": "strategies.flower:FedMedian",
    "fedtrimmedavg": "strategies.flower:FedTrimmedAvg",
    "krum": "strategies.flower:Krum",
    "multikrum": "strategies.flower:MultiKrum",
    "bulyan": "strategies.flower:Bulyan",
}
CLIENTS = {
    "fedavg": "clients.fedavg:FedAvg",
    "fedprox": "clients.fedprox:FedProx",
    "scaffold": "clients.scaffold:Scaffold",
    "fedld": "clients.fedld:FedLD",
    "gossip": "clients.gossip:Gossip",
    "dispfl": "clients.dispfl:DisPFL",
    "kafal": "clients.kafal:KAFAL",
    "knfu": "clients.knfu:KnFu",
    "fedap": "clients.fedap:FedAP",
    "ifca": "clients.ifca:IFCA",
    "pacfl": "clients.pacfl:PACFL",
    "local": "clients.local:Local",
    "ditto": "clients.ditto:Ditto",
    "perfedavg": "clients.perfedavg:PerFedAvg",
    "fedbn": "clients.fedbn:FedBN",
    "fedper": "clients.fedper:FedPer",
    "fedrep": "clients.fedrep:FedRep",
    "apfl": "clients.apfl:APFL",
    "pfedme": "clients.pfedme:PFedMe",
    "fedsam": "clients.fedsam:FedSAM",
    "fedkseed": "clients.fedkseed:FedKSeed",
    "ferret": "clients.ferret:Ferret",
    "fedzo": "clients.fedzo:FedZO",
    "flora": "clients.flora:FLoRA",
    "hetlora": "clients.hetlora:HetLoRA",
    "ffa_lora": "clients.ffa_lora:FFALoRA",
    "rolora": "clients.rolora:RoLoRA",
    "fedsa_lora": "clients.fedsa_lora:FedSALoRA",
    "fedspine": "clients.fedspine:FedSpine",
}
DEVICES = {
    "workstation": "fedsim.runtime.devices:Workstation",
    "phone": "fedsim.runtime.devices:Phone",
    "raspberry_pi_5": "fedsim.runtime.devices:RaspberryPi5",
    "jetson_tx2": "fedsim.runtime.devices:JetsonTX2",
    "jetson_nx": "fedsim.runtime.devices:JetsonNX",
    "jetson_agx": "fedsim.runtime.devices:JetsonAGX",
}
ORACLES = {
    "held": "fedsim.runtime.oracles:Held",
    "called": "fedsim.runtime.oracles:Called",
    "folder": "fedsim.runtime.oracles:Folder",
}
SINGULAR = {
    "strategies": "strategy",
    "clients": "client half",
    "datasets": "dataset",
    "models": "model",
    "partitioners": "partitioner",
    "devices": "device",
    "oracles": "oracle",
}
"""The kinds of components, and what one of them is called."""
GIVEN = {
    "datasets": frozenset({"seed"}),
    "partitioners": frozenset({"raw", "indices", "clients", "seed", "min_examples"}),
    "models": frozenset({"data", "input_shape", "num_outputs", "seed"}),
}
"""Parameters that the framework gives a component, so that an experiment cannot."""
NEEDY = frozenset(
    {"huggingface", "npz", "plays", "natural_instructions", "dolly", "alpaca", "hf_causal_lm"}
    | {"hf_encoder", "pydoc_topics"}
    | {"dirichlet", "inner_dirichlet", "size", "grouped_natural", "vertical_size"}
    | {"called", "folder", "isic"}
)
"""Built-in components that cannot be made without parameters."""
_EXTRAS = {
    "mlxtend": "data",
    "flwr_datasets": "data",
    "datasets": "data",
    "transformers": "llm",
    "peft": "llm",
    "gguf": "llm",
    "ray": "simulation",
    "numba": "fast",
    "opacus": "dp",
    "dp_accounting": "dp",
    "optuna": "hpo",
    "mlflow": "track",
    "tensorboard": "track",
}


_SHAPE = {
    "strategies": ("configure_train", "aggregate_train"),
    "clients": ("init", "step", "final"),
}


class UnresolvedError(ConfigError):
    """A name that leads to no component; `problem` says why without the name."""

    def __init__(self, kind: str, name: str, problem: str) -> None:
        super().__init__(f"{SINGULAR[kind]} {shown(name)}: {problem}")
        self.problem = problem


def builtin(kind: str) -> Mapping[str, str]:
    """The built-in names of a kind, with where they lead."""
    if kind in ("datasets", "partitioners"):
        catalogue = importlib.import_module("fedsim.data.catalogue")
        return getattr(catalogue, kind.upper())
    if kind == "models":
        return importlib.import_module("fedsim.models.catalogue").MODELS
    return {
        "strategies": STRATEGIES,
        "clients": CLIENTS,
        "devices": DEVICES,
        "oracles": ORACLES,
    }[kind]


@lru_cache
def _plugins(kind: str) -> Mapping[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=f"fedsim.{kind}")}


def names(kind: str) -> list[str]:
    """All names of a kind, built-in ones first."""
    return [*builtin(kind), *(n for n in sorted(_plugins(kind)) if n not in builtin(kind))]


def locate(kind: str, name: str) -> str:
    """Where a name leads, as ``"module:attribute"``; nothing is imported.

    Raises:
        ConfigError: there is no such name; the message has the nearest spelling.
    """
    if name in builtin(kind):
        return builtin(kind)[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        if all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
            return name
        raise UnresolvedError(kind, name, "must be a name or package.module:attribute")
    if name in _plugins(kind):
        return _plugins(kind)[name].value.partition("[")[0].replace(" ", "")
    known = names(kind)
    problem = f"unknown {SINGULAR[kind]}{did_you_mean(name, known)} (known: {', '.join(known)})"
    raise UnresolvedError(kind, name, problem)


def resolve(kind: str, name: str) -> Any:
    """The component of that name.

    Args:
        kind: ``"strategies"``, ``"clients"``, ``"datasets"``, ``"models"``, ``"partitioners"``,
            ``"devices"`` or ``"oracles"``.
        name: built-in name, name of a plug-in, or ``"package.module:attribute"``.

    Raises:
        ConfigError: no such name, or it cannot be imported; one line says why.
    """
    place = locate(kind, name)
    module, _, attribute = place.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnresolvedError(kind, name, _lacking(error, module)) from error
    except (Exception, SystemExit) as error:  # foreign code may raise anything
        problem = f"{module} fails on import: {type(error).__name__}: {tame(str(error))}"
        raise UnresolvedError(kind, name, problem) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = did_you_mean(part, [n for n in dir(found) if not n.startswith("_")])
            raise UnresolvedError(kind, name, f"{module} has no {attribute}{near}")
        found = getattr(found, part)
    lacks = [n for n in _SHAPE.get(kind, ()) if not hasattr(found, n)]
    if not callable(found) or lacks:
        problem = f"{place} is no {SINGULAR[kind]}: it has no {lacks[0] if lacks else 'call'}"
        raise UnresolvedError(kind, name, problem)
    return found


def plain(kind: str, name: str) -> bool:
    """Whether it is a built-in component that needs no parameters, so that its name is enough."""
    return name in builtin(kind) and name not in NEEDY


def describe(kind: str, name: str) -> str:
    """First line of the component's docstring, empty if it has none or cannot be found.

    The source is read, not imported: a list of names must not cost the import of torch, nor fail
    because an optional package is missing.
    """
    module, _, attribute = locate(kind, name).partition(":")
    try:
        body: list[ast.stmt] = ast.parse(_source(module).read_text(encoding="utf-8")).body
        for part in attribute.split("."):
            node = next(n for n in body if getattr(n, "name", None) == part)
            body = node.body  # type: ignore[attr-defined]
        text = ast.get_docstring(node)  # type: ignore[arg-type]
    except (OSError, ImportError, StopIteration, SyntaxError, TypeError, ValueError):
        return ""
    return (text or "").partition("\n")[0]


def _source(module: str) -> Path:
    """The file of a module, found without importing its package."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        raise ImportError(module)
    if not rest:
        return Path(spec.origin)
    path = Path(spec.origin).parent.joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _lacking(error: ModuleNotFoundError, module: str) -> str:
    missing = error.name or ""
    if module == missing or module.startswith(f"{missing}."):
        return f"there is no module {missing}; it is looked for on the Python path"
    package = missing.partition(".")[0]
    brings = f"'fedsim-flower[{_EXTRAS[package]}]'" if package in _EXTRAS else package
    return f"needs the Python package {package}, which is not installed: pip install {brings}"
