"""FedZO: steps without gradients, models that travel whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsim.config import StrategyConfig
from fedsim.core import directions
from fedsim.core.errors import ConfigError
from fedsim.core.records import as_flat
from strategies.fedzo import FedZO
from tests.contract import toy


def federation(options: Any = None, **params: Any) -> Any:
    entry = StrategyConfig(name="fedzo", params={"eps": 1e-3} | params)
    train = {"lr": 0.02, "max_steps": 12, "epochs": 12}
    return toy.federation(entry, **{"train": train, **(options or {})})


@pytest.mark.parametrize("params", [{}, {"perturbations": 3, "basis": "rademacher"}], ids=str)
def test_the_loss_falls(params: dict[str, Any]) -> None:
    losses = [r["loss"] for r in toy.run(federation({"rounds": 5}, **params)).rounds]
    assert losses[-1] < 0.7 * losses[0]


def test_many_perturbations_come_to_the_gradient() -> None:
    data = toy.federated(toy.SIZES[:1], dtype=torch.float64)
    train = {"lr": 0.02, "max_steps": 1}
    moves = []
    for name, params in (("fedavg", {}), ("fedzo", {"perturbations": 3000})):
        entry = StrategyConfig(name=name, params=params)
        fed = toy.federation(entry, data=data, train=train)
        start = fed.env.model.initial().flat
        moves.append(as_flat(toy.run(fed, 1).arrays).flat - start)
    error = float((moves[1] - moves[0]).norm() / moves[0].norm())
    assert error < 3 * (16 / 3000) ** 0.5


def test_nothing_is_stored_but_one_model() -> None:
    fed = federation()
    message = toy.messages_of(fed, fed.begin().arrays, 1)[0]
    with directions.count_draws() as draws:
        toy.contents_of(fed, [message])
    assert draws.total == 4 * 12 * 15


@pytest.mark.parametrize("wrong", [{"eps": 0.0}, {"perturbations": 0}, {"basis": "x"}], ids=str)
def test_wrong_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FedZO(**wrong)


def test_the_clock_charges_forward_passes_alone() -> None:
    """FedZO's step is two forward passes, FedAvg's a forward and a backward pass: three."""
    train = {"lr": 0.02, "max_steps": 3, "epochs": 12}
    for entry, passes in (
        (StrategyConfig(name="fedavg"), 3),
        (StrategyConfig(name="fedzo"), 2),
        (StrategyConfig(name="fedzo", params={"perturbations": 5}), 10),
        (StrategyConfig(name="fedkseed", params={"pool": 32, "steps": 3}), 2),
    ):
        fed = toy.federation(entry, train=train)
        assert fed.collector._operations(np.array(3), np.array(9)) == (
            fed.collector._flops * 12 * passes
        )
