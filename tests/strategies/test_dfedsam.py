"""DFedSAM and its family: the SAM step by hand, and what they reduce to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.fedsam import FedSAM
from fedsim.config import StrategyConfig
from fedsim.core.errors import ConfigError
from fedsim.core.program import Batch, Gradient, LocalState
from fedsim.core.records import from_record
from strategies.dfedavg import DFedAvg
from strategies.dfedsam import DFedSAM
from tests.contract import toy


class Quadratic(LocalState):
    """F(w) = 0.5 w' diag(1, 4) w."""

    def __init__(self, w, scale=1.0):
        super().__init__()
        self.w = torch.tensor(w, dtype=torch.float64)
        self.scale = scale
        self.visited = []

    def gradient(self, batch, at=None, training=True):
        point = self.w if at is None else at
        self.visited.append(point.clone())
        return Gradient(self.scale * torch.tensor([1.0, 4.0], dtype=torch.float64) * point)


BATCH = Batch({}, 0, 0)


def test_golden_sam_step():
    # g = (3, 4), delta = 0.1 g / 5 = (0.06, 0.08), g~ = (3.06, 4.32), w - 0.1 g~
    s = Quadratic([3.0, 1.0])
    FedSAM(rho=0.1, lr=0.1).step(s, BATCH)
    np.testing.assert_allclose(s.w, [2.694, 0.568], rtol=1e-12)
    np.testing.assert_allclose(s.visited[1] - s.visited[0], [0.06, 0.08], rtol=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.1, 3.0])
def test_the_perturbation_is_as_long_as_its_radius_and_the_step_begins_where_it_was(rho):
    s = Quadratic([0.3, -0.7])
    before = s.w
    FedSAM(rho=rho, lr=0.0).step(s, BATCH)
    assert torch.equal(s.w, before)  # bit for bit: nothing was added and taken away again
    moved = s.visited[-1] - s.visited[0]
    assert float(moved.norm()) == pytest.approx(rho, rel=1e-9)


def test_the_second_pass_leaves_batch_statistics_alone():
    """After one step they are those of plain SGD, however far the perturbed point was."""
    found = []
    for rho in (0.0, 5.0):
        entry = StrategyConfig(name="fedsam", params={"rho": rho})
        fed = toy.federation(entry, model="bn", rounds=1, train={"max_steps": 1})
        state = from_record(toy.run(fed).arrays)
        found.append({n: t for n, t in state.items() if "running" in n or "num_batches" in n})
    assert len(found[0]) == 3
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())


def test_scaling_the_loss_leaves_the_perturbation_unchanged():
    deltas = []
    for scale in (1.0, 100.0):
        s = Quadratic([3.0, 1.0], scale)
        FedSAM(rho=0.1, lr=0.1).step(s, BATCH)
        deltas.append(s.visited[1] - s.visited[0])
    torch.testing.assert_close(*deltas, rtol=1e-9, atol=0)


def test_at_a_stationary_point_nothing_moves():
    s = Quadratic([0.0, 0.0])
    FedSAM(rho=0.1, lr=0.1).step(s, BATCH)
    assert s.w.tolist() == [0.0, 0.0]


def test_without_radius_it_is_sgd():
    s = Quadratic([3.0, 1.0])
    FedSAM(rho=0.0, lr=0.1).step(s, BATCH)
    assert s.w.tolist() == [3.0 - 0.1 * 3.0, 1.0 - 0.1 * 4.0]
    assert len(s.visited) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DFedAvg(topology="rings"), "topology = 'rings' must be one of ring"),
        (lambda: DFedAvg(gossip_steps=0), "gossip_steps = 0"),
        (lambda: DFedAvg(edges=[[0, 1, 2]]), "pairs of client numbers"),
        (lambda: DFedSAM(rho=-1), "rho = -1"),
    ],
)
def test_wrong_parameters_are_refused(make, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        make()
