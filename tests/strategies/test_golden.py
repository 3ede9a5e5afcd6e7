"""Whole rounds on a line through the origin, beside the few lines of numpy that derive them.

Client i holds points (x, t) and the loss ``mean (w x - t)^2 / 2``, so its gradient at w is
``mean x (w x - t)``. Every local step takes all of a client's points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.config import StrategyConfig
from fedsim.core.records import from_record
from fedsim.data import FederatedData, Ragged
from tests.contract import toy

POINTS = {0: ([1.0, 2.0], [2.0, 3.0]), 1: ([1.0, -1.0, 3.0], [-1.0, 2.0, 1.0])}
W0, LR, STEPS, ROUNDS = 0.5, 0.05, 3, 3


def line() -> FederatedData:
    """The points as a federation of two clients."""
    x, t = (torch.tensor([v for p in POINTS.values() for v in p[i]]) for i in (0, 1))
    mine = Ragged.from_lists([np.arange(2), np.arange(2, 5)])
    return FederatedData(
        name="line",
        fields={"x": x[:, None], "y": t},
        train=mine,
        test=mine,
        central_test=np.arange(5),
        criterion="mse",
        num_outputs=1,
        input_shape=(1,),
        client_names=("0", "1"),
        heldout_clients=np.empty(0, np.int64),
        groups=None,
        fingerprint="line",
        meta={},
    )


def found(strategy: str, **params: Any) -> list[float]:
    """The weight after every round."""
    fed = toy.federation(
        StrategyConfig(name=strategy, params=params),
        model="line",
        data=line(),
        train={"lr": LR, "batch_size": 5, "epochs": STEPS},
    )
    progress = fed.begin()
    weights = [from_record(progress.arrays)["weight"].item()]
    assert weights == [W0]
    for _ in range(ROUNDS):
        fed.advance(progress)
        weights.append(from_record(progress.arrays)["weight"].item())
    return weights[1:]


def gradient(client: int, w: float) -> float:
    x, t = map(np.array, POINTS[client])
    return float((x * (w * x - t)).mean())


def descend(client: int, w: float, correction: Callable[[float], float] = lambda w: 0.0) -> float:
    for _ in range(STEPS):
        w -= LR * (gradient(client, w) + correction(w))
    return w


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
@pytest.mark.parametrize("weighted", [True, False])
def test_fedavg(weighted: bool, server_lr: float) -> None:
    w, expected, share = W0, [], [0.4, 0.6] if weighted else [0.5, 0.5]
    for _ in range(ROUNDS):
        w += server_lr * (share[0] * descend(0, w) + share[1] * descend(1, w) - w)
        expected.append(w)
    assert found("fedavg", weighted=weighted, server_lr=server_lr) == pytest.approx(expected)


def test_fedprox() -> None:
    mu, w, expected = 2.0, W0, []
    for _ in range(ROUNDS):
        pull = lambda v, w=w: mu * (v - w)  # noqa: E731
        w = 0.4 * descend(0, w, pull) + 0.6 * descend(1, w, pull)
        expected.append(w)
    assert found("fedprox", mu=mu) == pytest.approx(expected)


def test_scaffold() -> None:
    x, c, own, expected = W0, 0.0, [0.0, 0.0], []
    for _ in range(ROUNDS):
        y = [descend(i, x, lambda _, pull=c - own[i]: pull) for i in (0, 1)]
        new = [own[i] - c + (x - y[i]) / (STEPS * LR) for i in (0, 1)]  # option II
        c += sum(new[i] - own[i] for i in (0, 1)) / 2
        x, own = sum(y) / 2, new
        expected.append(x)
    assert found("scaffold") == pytest.approx(expected)


def update(w: float) -> float:
    """The mean update d of a round of FedAvg."""
    return 0.4 * descend(0, w) + 0.6 * descend(1, w) - w


def test_fedavgm() -> None:
    w, v, expected = W0, 0.0, []
    for _ in range(ROUNDS):
        v = 0.9 * v - update(w)
        w -= 0.5 * v
        expected.append(w)
    parameters = {"server_learning_rate": 0.5, "server_momentum": 0.9}
    assert found("fedavgm", **parameters) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_servers(name: str) -> None:
    eta, b1, b2, tau = 0.1, 0.9 * (name != "fedadagrad"), 0.99, 1e-3
    w, m, v, expected = W0, 0.0, 0.0, []
    for t in range(1, ROUNDS + 1):
        d = update(w)
        m = b1 * m + (1 - b1) * d
        v = {
            "fedadam": b2 * v + (1 - b2) * d**2,
            "fedyogi": v - (1 - b2) * d**2 * np.sign(v - d**2),
            "fedadagrad": v + d**2,
        }[name]
        bias = np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1)) if name == "fedadam" else 1.0
        w += eta * bias * m / (np.sqrt(v) + tau)
        expected.append(w)
    assert found(name, eta=eta) == pytest.approx(expected, rel=1e-5)
