"""Local programs: the SGD of PyTorch, without its objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsim.core.criteria import criterion
from fedsim.core.errors import ConfigError
from fedsim.core.model import FlatModel
from fedsim.core.program import Batch, Gradient, LocalProgram, LocalState, dot, norm
from fedsim.core.records import from_record
from fedsim.data import FederatedData
from fedsim.runtime.cohort import Outcomes, Work
from fedsim.runtime.plan import Plan
from fedsim.runtime.serial import Serial
from tests.contract import toy

CLIENT = 2


def work(program: LocalProgram, model: str, data: FederatedData) -> tuple[FlatModel, Outcomes]:
    """What one client's work gives."""
    resident = FlatModel(toy.module(model), criterion("cross_entropy"))
    todo = Work(program, np.array([CLIENT]), 3, toy.SEED, resident.initial())
    (outcomes,) = Serial(resident, data, debug=True).map(todo, lambda outcomes: outcomes)
    return resident, outcomes


@pytest.mark.parametrize("model", ["softmax", "mlp", "bn"])
@pytest.mark.parametrize(
    "sgd",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"momentum": 0.5, "weight_decay": 0.01},
    ],
    ids=str,
)
def test_sgd_is_that_of_pytorch(model: str, sgd: dict[str, float]) -> None:
    data = toy.federated()
    program = LocalProgram(lr=0.2, epochs=3, batch_size=5, **sgd)  # type: ignore[arg-type]
    _, outcomes = work(program, model, data)

    module, losses = toy.module(model), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, **sgd)  # type: ignore[arg-type]
    plan = Plan.of(program, data.train, np.array([CLIENT]), toy.SEED, 3)
    for step in range(int(plan.steps[0])):
        rows = torch.from_numpy(plan.batch(0, step)[0])
        loss = cross_entropy(module(data.fields["x"][rows]), data.fields["y"][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    layout = FlatModel(module, criterion("cross_entropy")).layout
    found = layout.views(outcomes.flat[0]) | (outcomes.beside[0] if outcomes.beside else {})
    for name, expected in module.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    assert outcomes.metrics["loss"][0] == pytest.approx(np.mean(losses), rel=1e-5)
    assert outcomes.num_examples[0] == toy.SIZES[CLIENT]
    assert outcomes.num_steps[0] == len(losses) == 3 * 3


def test_the_limit_on_steps() -> None:
    data = toy.federated()
    _, outcomes = work(LocalProgram(epochs=5, batch_size=4, max_steps=4), "softmax", data)
    assert outcomes.num_steps[0] == 4


def test_frozen_batchnorm_keeps_its_statistics() -> None:
    model, outcomes = work(LocalProgram(frozen_bn=True, batch_size=4), "bn", toy.federated())
    trained = model.layout.num_trainable
    start = model.initial().flat
    assert torch.equal(outcomes.flat[0, trained:], start[trained:])
    assert not torch.equal(outcomes.flat[0, :trained], start[:trained])
    assert outcomes.beside[0]["1.num_batches_tracked"] == 0


@dataclass(frozen=True, kw_only=True)
class Elsewhere(LocalProgram):
    """Looks at gradients away from `w`, then goes down from `w`."""

    def step(self, s: LocalState, batch: Batch) -> None:
        s.gradient(batch, at=s.w + 1.0)
        s.gradient(batch, training=False)
        super().step(s, batch)


def test_gradients_elsewhere_leave_no_trace() -> None:
    data = toy.federated()
    _, plain = work(LocalProgram(batch_size=4), "bn", data)
    _, looking = work(Elsewhere(batch_size=4), "bn", data)
    assert torch.equal(plain.flat, looking.flat)
    assert plain.beside[0]["1.num_batches_tracked"] == looking.beside[0]["1.num_batches_tracked"]


@dataclass(frozen=True, kw_only=True)
class Counting(LocalProgram):
    """Counts its rounds on the client."""

    keeps = ("rounds",)

    def final(self, s: LocalState) -> None:
        s.kept["rounds"] = s.kept["rounds"] + 1
        s.sent["twice"] = 2 * s.kept["rounds"]
        s.metrics["moved"] = norm(s.w - s.start)


def test_what_a_program_keeps_sends_and_reports() -> None:
    _, outcomes = work(Counting(), "softmax", toy.federated())
    assert outcomes.kept["rounds"][0].unique().tolist() == [1]
    assert outcomes.sent["twice"][0].unique().tolist() == [2]
    assert outcomes.metrics["moved"][0] > 0


class Constant(LocalState):
    """A gradient of one."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w, self.start = w, w.clone()

    def gradient(self, batch: Batch, at: Tensor | None = None, training: bool = True) -> Gradient:
        return Gradient(torch.ones_like(self.w))


@dataclass(frozen=True, kw_only=True)
class Pulled(LocalProgram):
    """Adds five to every gradient."""

    def correction(self, s: LocalState) -> Tensor | None:
        return torch.full_like(s.w, 5.0)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_a_correction_is_part_of_the_gradient(momentum: float, shape: tuple[int, ...]) -> None:
    """For one client and for stacked ones."""
    s = Constant(torch.zeros(shape))
    program = Pulled(lr=0.1, momentum=momentum, weight_decay=2.0)
    w = v = 0.0
    for _ in range(3):
        program.step(s, Batch({}, 0, 0))
        v = momentum * v + 1 + 2 * w + 5
        w -= 0.1 * v
    torch.testing.assert_close(s.w, torch.full(shape, w))


def test_products_keep_the_last_axis() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert norm(a).tolist() == [[5.0], [1.0]]
    assert dot(a, a).tolist() == [[25.0], [1.0]]


def test_a_program_is_made_from_a_message() -> None:
    config = {"epochs": 2, "lr": 1, "server-round": 7, "frozen_bn": True, "other": "x"}
    assert LocalProgram.from_config(config) == LocalProgram(epochs=2, lr=1.0, frozen_bn=True)


@pytest.mark.parametrize(
    "config", [{"epochs": 2.0}, {"epochs": True}, {"lr": "fast"}, {"frozen_bn": 1}, {"lr": True}]
)
def test_values_of_the_wrong_type_are_refused(config: dict[str, Any]) -> None:
    (name,) = config
    with pytest.raises(ConfigError, match=name):
        LocalProgram.from_config(config)


def test_a_broken_program_is_a_fault_of_its_client_alone() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Broken(LocalProgram):
        def step(self, s: LocalState, batch: Batch) -> None:
            if s.num_examples == toy.SIZES[1]:
                raise ArithmeticError("lost")
            super().step(s, batch)

    model = FlatModel(toy.module(), criterion("cross_entropy"))
    todo = Work(Broken(), np.arange(3), 1, toy.SEED, model.initial())
    parts = list(Serial(model, toy.federated()).map(todo, lambda outcomes: outcomes))
    assert [list(p.faults) for p in parts] == [[], [1], []]
    assert isinstance(parts[1].faults[1], ArithmeticError)
    assert from_record(model.initial()).keys() == {"weight", "bias"}
