"""The table of the contract: a new strategy gets every test of this folder by adding a row.

A row names a strategy as an experiment file would. Files beside this one take `ROWS` (every
strategy) and `PAIRS` (algorithms that must agree with simpler ones), and may be added to: a test
that parametrises over `ROWS` holds for every strategy there is and will be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from fedsim.config import StrategyConfig
from fedsim.federation import Federation
from fedsim.runtime.work import client_of
from tests.contract import toy


@dataclass(frozen=True, eq=False)
class Row:
    """A strategy with parameters, on a toy model.

    Attributes:
        strategy: name of the strategy, as in ``[[strategy]] name = ...``.
        params: its parameters.
        model: kind of toy model (`toy.module`).
        train: keys of ``[train]`` that differ.
        optimises: the server adds momentum or a step of its own, so that identical replies do not
            give that reply back.
        refactors: what comes back is the same function in other parameters: in other factors, or
            merged into the base.
        rounding: relative difference to allow where an equality holds up to rounding: 0 for
            strategies that sum models in float64, more for those that add float32 updates.
        fewest: fewest replies that the strategy aggregates.
        packed: messages hold packed bytes instead of a model.
    """

    strategy: str
    params: Mapping[str, Any] = field(default_factory=dict)
    model: str = "softmax"
    train: Mapping[str, Any] = field(default_factory=dict)
    optimises: bool = False
    refactors: bool = False
    rounding: float = 0.0
    fewest: int = 1
    packed: bool = False

    @property
    def id(self) -> str:
        """Name of the row in reports."""
        params = "".join(f"-{k}={v}" for k, v in self.params.items())
        return f"{self.strategy}{params}{'' if self.model == 'softmax' else '-' + self.model}"

    @property
    def entry(self) -> StrategyConfig:
        """The row as it stands in an experiment."""
        return StrategyConfig(name=self.strategy, params=dict(self.params), train=dict(self.train))

    @property
    def client(self) -> str:
        """Name of its client half."""
        return client_of(self.strategy, None)

    def federation(self, **options: Any) -> Federation:
        """A toy federation with this strategy; `options` are those of `toy.federation`."""
        return toy.federation(self.entry, **{"model": self.model, **options})


ULP = 1e-6
"""What float32 sums of seven numbers may differ by."""

ZEROTH: dict[str, Any] = {"pool": 32, "steps": 6, "lr": 0.02, "eps": 1e-3}
TWO = {"warmup_rounds": 1, "cut": "k", "k": 2}
"""Two clusters from the second round on."""

POOLS = {"initial": 0.5, "budget": 0.2, "participation": 1.0}
"""Half of the examples labelled, and every client in every round."""

ROWS = [
    Row("fedavg"),
    Row("fedavg", model="bn"),
    Row("fedavg", {"server_lr": 0.5, "weighted": False}, optimises=True),
    Row("fedprox", {"mu": 0.1}),
    Row("scaffold"),
    Row("scaffold", model="bn"),
    Row("fedld", rounding=ULP),
    Row("fedld", {"margin_form": "logit", "first_round": "principal"}, rounding=ULP),
    Row("fedld", model="bn", rounding=ULP),
    Row("fedld_official", model="bn", train={"momentum": 0.5, "epochs": 2}, rounding=ULP),
    Row("fedsam", {"rho": 0.05}),
    Row("fedsam", {"rho": 0.05}, model="bn"),
    Row("dfedavg", {"topology": "full"}, rounding=ULP),
    Row("dfedavgm", rounding=ULP),
    Row("dpsgd", {"topology": "directed_exponential"}, rounding=ULP),
    Row("dfedsam", {"rho": 0.05, "topology": "random", "degree": 2}, rounding=ULP),
    Row("dfedsam", {"rho": 0.05}, model="bn", rounding=ULP),
    Row("dfedsam_mgs", {"rho": 0.05}, rounding=ULP),
    Row("gossip_relay", {"rho": 0.05, "gossip_steps": 2}, rounding=ULP),
    Row("gossip_relay", {"topology": "random", "degree": 2}, model="bn", rounding=ULP),
    Row("dispfl", {"topology": "full"}, model="mlp", rounding=ULP),
    Row("dispfl", {"topology": "full"}, model="bn", rounding=ULP),
    Row("kafal", {**POOLS, "rounds_per_cycle": 2}),
    Row("kafal", {**POOLS, "rounds_per_cycle": 1, "warm_start": True}, train={"momentum": 0.5}),
    Row("active_learning", {"rule": "badge", "rounds_per_cycle": 1, "initial": 0.5}, model="mlp"),
    Row("knfu", rounding=ULP),
    Row(
        "knfu",
        {"distance": "js", "fuse_where": "client", "finetune_ce": 0.5},
        model="mlp",
        rounding=ULP,
    ),
    Row("fedmd", {"alignment": 6}, model="mlp", rounding=ULP),
    Row("selective_fd", rounding=ULP),
    Row("feddf", {"server_steps": 3}, model="mlp", optimises=True),
    Row("fedkseed", ZEROTH, packed=True),
    Row("fedkseed", {**ZEROTH, "basis": "rademacher32"}, model="mlp", packed=True),
    Row("fedkseed_pro", ZEROTH, packed=True),
    Row("ferret", {"bases": 16}, packed=True),
    Row("ferret", {"bases": 16, "momentum": 0.5, "multiple": 0.0}, model="mlp", packed=True),
    Row("ferret", {"bases": 16, "fresh": "round", "half": True}, packed=True),
    Row("fedzo", {"eps": 1e-3}),
    Row("fedit", model="lora", rounding=ULP),
    Row("fedit", model="lora_delta", rounding=ULP),
    Row("flora", model="lora_delta", refactors=True, rounding=1e-5),
    Row("flora", {"ranks": [1, 2]}, model="lora_delta", refactors=True, rounding=1e-5),
    Row("fedex_lora", model="lora_delta", refactors=True, rounding=1e-5),
    Row("flexlora", model="lora", refactors=True, rounding=1e-5),
    Row("flexlora", {"ranks": [2, 1]}, model="lora", refactors=True, rounding=1e-5),
    Row("hetlora", model="lora", rounding=ULP),
    Row("hetlora", {"gamma": 0.5, "penalty": 0.1}, model="lora", rounding=ULP),
    Row("ffa_lora", model="lora"),
    Row("rolora", model="lora", rounding=ULP),
    Row("fedsa_lora", model="lora"),
    Row("lora_lego", model="lora", rounding=ULP),
    Row("lora_lego", {"parameter_reweight": True, "gamma_max": 1.1}, model="lora", rounding=1e-5),
    Row(
        "lora_lego", {"mode": "merge_and_reinit"}, model="lora_delta", refactors=True, rounding=1e-5
    ),
    Row("lora_lego", {"mode": "residual"}, model="lora_delta", refactors=True, rounding=1e-5),
    Row("lora_lego", {"mode": "residual", "ranks": [1, 2]}, model="lora_delta", optimises=True),
    Row(
        "fedspine",
        {"step": 0.3, "interval": 2, "policy": {"name": "ucb_tree", "lowest": 1}},
        model="prunable",
        optimises=True,
    ),
    Row(
        "fedspine",
        {"step": 0.4, "policy": "random", "aggregation": "pad", "beta": 1.0, "eta": 0.5},
        model="prunable",
        optimises=True,
    ),
    Row("fedavgm", optimises=True),
    Row("fedadam", {"eta": 0.01}, optimises=True),
    Row("fedadam", {"eta": 0.01}, model="bn", optimises=True),
    Row("fedyogi", optimises=True),
    Row("fedadagrad", {"eta": 0.01}, optimises=True),
    Row("fedmedian", rounding=ULP),
    Row("fedtrimmedavg", rounding=ULP),
    Row("krum", {"num_malicious_nodes": 1}, rounding=ULP),
    Row("multikrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}, rounding=ULP),
    Row("multikrum", {"num_nodes_to_select": 3}, model="bn", rounding=ULP),
    Row("bulyan", {"num_malicious_nodes": 1}, rounding=ULP, fewest=7),
    Row("fedap", {**TWO, "inner": "fedavg", "personal_epochs": 1}, rounding=ULP),
    Row("fedap", {**TWO, "weighted": False}, model="bn", optimises=True),
    Row("fedap", {**TWO, "weighted": False, "inner": "fomaml"}, model="mlp", optimises=True),
    Row("fedap_official", {**TWO, "weighted": False}, model="bn", optimises=True),
    Row("flhc", {**TWO, "init": "members"}, rounding=ULP),
    Row("fedclust", {"cut": "k", "k": 2}, model="bn", rounding=ULP),
    Row("pacfl", {"cut": "k", "k": 2}, model="mlp", rounding=ULP),
    Row("ifca", {"k": 2}, rounding=ULP),
    Row("cfl", {"patience": 0, "eps1": 99, "eps2": 0}, rounding=ULP),
    Row("ditto"),
    Row("ditto", {"lam": 0.1}, model="bn"),
    Row("apfl"),
    Row("pfedme", {"lam": 5}),
    Row("perfedavg"),
    Row("perfedavg", {"order": "hessian_free"}, model="mlp"),
    Row("fedper", model="mlp"),
    Row("fedrep", model="mlp"),
    Row("fedbn", model="bn"),
]


@dataclass(frozen=True)
class Pair:
    """Two algorithms that must agree.

    Attributes:
        one: the algorithm with degenerate parameters.
        other: the simpler algorithm it becomes.
        rounds: for how many rounds they agree.
        options: of `toy.federation`, for both.
        tolerance: relative difference allowed; 0: the same bits.
    """

    one: Row
    other: Row
    rounds: int = 3
    options: Callable[[], Mapping[str, Any]] = dict
    tolerance: float = 0.0

    @property
    def id(self) -> str:
        """Name of the pair in reports."""
        return f"{self.one.id}~{self.other.id}"


UNIFORM = Row("fedavg", {"weighted": False})
FAR = 1e6
"""Adaptivity so small that the server's optimizer is plain gradient ascent."""


def _equal() -> dict[str, Any]:
    return {"data": toy.federated(toy.EQUAL)}


def _identical() -> dict[str, Any]:
    """Every client has the same examples, and takes them all at once."""
    return {
        "data": toy.federated(toy.EQUAL, identical=True),
        "train": {"batch_size": 8, "epochs": 2},
    }


def _one_client() -> dict[str, Any]:
    return {"data": toy.federated(toy.SIZES[:1])}


def _far(**params: float) -> dict[str, float]:
    return {"eta": FAR, "tau": FAR, **params}


PAIRS = [
    Pair(Row("fedprox", {"mu": 0}), Row("fedavg")),
    Pair(Row("fedavg", {"server_lr": 1}), Row("fedavg")),
    Pair(UNIFORM, Row("fedavg"), options=_equal),
    Pair(Row("scaffold"), UNIFORM, rounds=1),
    Pair(Row("scaffold", {"weighted": True}), Row("fedavg"), rounds=1),
    Pair(Row("fedld", {"margin_lambda": 0}), UNIFORM, rounds=1, tolerance=ULP),
    Pair(Row("fedld", {"margin_lambda": 0, "rho": 0.3}), UNIFORM, options=_identical,
         tolerance=ULP),
    Pair(Row("fedld", {"margin_lambda": 0, "rho": 0.3}), UNIFORM, options=_one_client,
         tolerance=ULP),
    Pair(Row("gossip_relay", {"rho": 0.05, "gossip_steps": 3}),
         Row("dfedsam", {"rho": 0.05, "gossip_steps": 3})),
    Pair(Row("gossip_relay", {"topology": "exponential"}, model="mlp"),
         Row("dfedavg", {"topology": "exponential"}, model="mlp")),
    Pair(Row("dfedavg", train={"max_steps": 1}), Row("dpsgd")),
    Pair(Row("dispfl", {"density": 1.0, "topology": "full"}, model="mlp"),
         Row("dfedavg", {"topology": "full"}, model="mlp"), tolerance=ULP),
    Pair(Row("active_learning", {"initial": 1.0, "rounds_per_cycle": 5}), Row("fedavg")),
    Pair(Row("feddf", {"server_steps": 0}, model="mlp"), Row("fedavg", model="mlp")),
    Pair(Row("fedsam", {"rho": 0}), Row("fedavg")),
    Pair(Row("fedsam", {"rho": 0}, model="bn"), Row("fedavg", model="bn")),
    Pair(Row("dfedavg", {"topology": "full"}), UNIFORM, tolerance=ULP),
    Pair(Row("dfedsam", {"topology": "full", "rho": 0}), UNIFORM, tolerance=ULP),
    Pair(Row("dfedsam", {"topology": "full", "rho": 0}, model="bn", train={"momentum": 0.9}),
         Row("fedavg", {"weighted": False}, model="bn", train={"momentum": 0.9}), tolerance=ULP),
    Pair(Row("dfedavgm", {"topology": "full", "momentum": 0.9}),
         Row("fedavg", {"weighted": False}, train={"momentum": 0.9}), tolerance=ULP),
    Pair(Row("dfedsam", {"topology": "full", "rho": 0.05}),
         Row("fedsam", {"rho": 0.05, "weighted": False}), tolerance=ULP),
    Pair(Row("dfedsam", {"rho": 0}), Row("dfedavg")),
    Pair(Row("dfedavgm", {"momentum": 0}), Row("dfedavg")),
    Pair(Row("dfedsam_mgs", {"topology": "full"}), Row("dfedsam", {"topology": "full"}),
         tolerance=ULP),
    Pair(Row("fedit", model="lora"), Row("fedavg", model="lora"), tolerance=ULP),
    Pair(Row("lora_lego", {"weighted": False}, model="lora"),
         Row("fedit", {"weighted": False}, model="lora"), rounds=1, tolerance=ULP),
    Pair(Row("lora_lego", {"mode": "merge_and_reinit", "mass": True, "clusters": 14},
             model="lora_delta"), Row("flora", model="lora_delta"), tolerance=1e-5),
    Pair(
        Row("fedspine", {"target": 0.0, "policy": "fixed"}, model="prunable"),
        Row("flexlora", model="prunable"),
        tolerance=1e-5,
    ),
    Pair(
        Row("fedspine", {"target": 0.0, "policy": "fixed", "aggregation": "pad"}, model="prunable"),
        Row("fedit", model="prunable"),
        tolerance=ULP,
    ),
    Pair(Row("fedavgm", {"server_momentum": 0}), Row("fedavg"), tolerance=ULP),
    Pair(Row("fedadam", _far(beta_1=0, beta_2=0)), Row("fedavg"), tolerance=1e-4),
    Pair(Row("fedyogi", _far(beta_1=0)), Row("fedavg"), tolerance=1e-4),
    Pair(Row("fedadagrad", _far()), Row("fedavg"), tolerance=1e-4),
    Pair(Row("fedtrimmedavg", {"beta": 0}), UNIFORM, tolerance=ULP),
    Pair(Row("multikrum", {"num_nodes_to_select": 7}), Row("fedavg"), tolerance=ULP),
    Pair(Row("multikrum", {"num_nodes_to_select": 1}), Row("krum")),
    Pair(Row("bulyan"), UNIFORM, tolerance=ULP),
    Pair(Row("fedap", {"warmup_rounds": 3}), Row("fedavg")),
    Pair(Row("fedap", {"warmup_rounds": 0, "signature_epochs": 1, "cut": "k", "k": 1,
                       "meta_step": 1, "meta_step_end": 1}), Row("fedavg")),
    Pair(Row("flhc", {"warmup_rounds": 2, "cut": "k", "k": 7}), Row("fedavg"), rounds=2),
    Pair(Row("ifca", {"k": 1, "weighted": True}), Row("fedavg")),
    Pair(Row("cfl", {"eps1": 0, "patience": 0}), UNIFORM),
    Pair(Row("ditto", {"lam": 0}), Row("fedavg")),
    Pair(Row("ditto", {"lam": 2}), Row("fedavg")),
    Pair(Row("apfl", {"alpha": 0}), Row("fedavg")),
    Pair(Row("perfedavg", {"alpha": 0}), UNIFORM),
    Pair(Row("fedbn", model="mlp"), Row("fedavg", model="mlp")),
]  # fmt: skip


@cache
def honest(row: Row, rounds: int = 2) -> str:
    """Digest of the row's model after some rounds in which nothing happens."""
    return toy.sha256(toy.run(row.federation(), rounds).arrays)


BARE = [Row("local", model="bn"), Row("local_only", model="mlp")]
"""Strategies whose messages hold no entry that could be spoiled; `test_local.py` has the rest."""


def every(rows: list[Row] = [*ROWS, *BARE]) -> pytest.MarkDecorator:  # noqa: B006
    """Parametrise a test over rows, as its argument `row`."""
    return pytest.mark.parametrize("row", rows, ids=[r.id for r in rows])
