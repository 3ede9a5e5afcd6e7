"""Backward passes written by hand, and models kept as what moved them, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim.core import rng
from fedsim.core.bulk import Rows
from fedsim.core.criteria import criterion
from fedsim.core.model import FlatModel
from fedsim.core.program import LocalProgram, LocalState
from fedsim.data import FederatedData, Ragged
from fedsim.runtime import batched
from fedsim.runtime import choose as choosing
from fedsim.runtime.batched import Batched, blocks_of
from fedsim.runtime.chain import Chain
from fedsim.runtime.choose import choose
from fedsim.runtime.cohort import Outcomes, Work
from fedsim.runtime.factors import Moved, Point
from fedsim.runtime.serial import Serial
from fedsim.runtime.threads import Workers

CE = criterion("cross_entropy")


def model(*layers: nn.Module) -> FlatModel:
    return FlatModel(nn.Sequential(*layers).double(), CE)


def images() -> FlatModel:
    """Strides, padding, groups, an odd size that pooling cuts, and no bias once."""
    with rng.isolated(3):
        return model(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 2, stride=2, groups=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(6, 5),
            nn.Sigmoid(),
            nn.Linear(5, 3),
        )


def mlp() -> FlatModel:
    with rng.isolated(4):
        return model(
            nn.Flatten(), nn.Linear(50, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.Linear(6, 3)
        )


def data(shape: tuple[int, ...], sizes: list[int]) -> FederatedData:
    draw = rng.stream(5, 0, 0, "chain")
    total = sum(sizes)
    x = torch.from_numpy(draw.normal(size=(total, *shape)))
    y = torch.from_numpy(draw.integers(0, 3, total))
    own = Ragged.from_lengths(np.arange(total), np.array(sizes))
    none = np.empty(0, np.int64)
    return FederatedData(
        *("chain", {"x": x, "y": y}, own, Ragged.from_lists([none] * len(sizes)), none),
        *("cross_entropy", 3, shape, tuple(map(str, range(len(sizes)))), none, None, "chain", {}),
    )


def both(
    flat: FlatModel, given_data: FederatedData, program: LocalProgram, block: int = 4
) -> tuple[Tensor, Outcomes]:
    """The clients' models by autograd, and what one block after another gives."""
    clients = np.arange(given_data.num_clients)
    work = Work(program, clients, 1, 0, flat.initial())
    alone = [o.flat[0].clone() for o in Serial(flat, given_data, True).map(work, lambda o: o)]
    chain = Chain.of(flat, True)
    assert chain is not None
    made = Batched(flat, given_data, Workers(1), chain, block)
    outcomes = list(made.map(work, lambda o: o))
    for one in outcomes:
        assert not one.faults
    return torch.stack(alone), Outcomes.join(outcomes) if len(outcomes) > 1 else outcomes[0]


def ordered(outcomes: Outcomes) -> Tensor:
    return outcomes.flat[torch.from_numpy(np.argsort(outcomes.clients))]


@pytest.mark.parametrize("block", [1, 3])
def test_convolutions_by_hand_are_autograd(block: int) -> None:
    program = LocalProgram(epochs=2, batch_size=4, lr=0.1)
    alone, block_ = both(images(), data((2, 7, 7), [9, 4, 6]), program, block)
    assert torch.allclose(ordered(block_), alone, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    epochs=st.integers(1, 2),
    batch=st.integers(1, 5),
    momentum=st.sampled_from([0.0, 0.5]),
)
def test_ragged_clients_in_factors_are_what_they_are_alone(
    sizes: list[int], epochs: int, batch: int, momentum: float
) -> None:
    program = LocalProgram(epochs=epochs, batch_size=batch, lr=0.2, momentum=momentum)
    alone, block = both(mlp(), data((5, 10), sizes), program, len(sizes))
    assert torch.allclose(ordered(block), alone, rtol=0, atol=1e-12)


def test_examples_may_be_gathered_for_a_few_steps_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batched, "WINDOW_BYTES", 3000)  # seven examples
    monkeypatch.setattr(batched, "TABLE", 40)  # five steps
    program = LocalProgram(epochs=3, batch_size=2, lr=0.1)
    alone, block = both(mlp(), data((5, 10), [9, 4, 6, 1]), program, 4)
    assert torch.allclose(ordered(block), alone, rtol=0, atol=1e-12)


def wide_images() -> FlatModel:
    with rng.isolated(6):
        return model(
            nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 9), nn.ReLU(), nn.Linear(9, 3),
        )  # fmt: skip


@pytest.mark.parametrize(("made", "shape"), [(mlp, (5, 10)), (wide_images, (2, 7, 7))])
def test_few_steps_are_kept_as_what_moved_the_clients(
    made: Callable[[], FlatModel], shape: tuple[int, ...]
) -> None:
    program = LocalProgram(batch_size=2, lr=0.3)
    alone, block = both(made(), data(shape, [4, 2, 3]), program, 3)
    assert torch.allclose(ordered(block), alone, rtol=0, atol=1e-12)
    assert isinstance(block.rows, Moved)
    share = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    written = Rows(block.rows.dense())
    assert torch.allclose(block.rows.mean(share), written.mean(share), rtol=0, atol=1e-12)
    assert bool((block.rows.bounds() >= written.bounds()).all())
    many, block = both(made(), data(shape, [90]), program, 1)
    assert torch.allclose(block.flat, many, rtol=0, atol=1e-12)
    assert not isinstance(block.rows, Moved)


class Looks(LocalProgram):
    """Looks at its model, and changes it, between two steps."""

    def step(self, s: LocalState, batch: Any) -> None:
        super().step(s, batch)
        s.metrics["size"] = s.w.square().sum(-1, keepdim=True)
        s.w.mul_(0.9)


def test_a_program_that_looks_sees_its_model() -> None:
    alone, block = both(mlp(), data((5, 10), [6, 5]), Looks(batch_size=2, lr=0.3), 2)
    assert torch.allclose(ordered(block), alone, rtol=0, atol=1e-12)


def test_not_finite_models_have_bounds_that_say_so() -> None:
    flat = mlp()
    given_data = data((5, 10), [4, 4])
    given_data.fields["x"][1] = float("nan")
    _, block = both(flat, given_data, LocalProgram(batch_size=2, lr=0.3), 2)
    fine = torch.isfinite(block.rows.bounds())
    assert fine[block.clients.tolist().index(1)]
    assert not fine[block.clients.tolist().index(0)]


def test_elsewhere_and_shared_points_agree() -> None:
    flat = images()
    chain = Chain.of(flat, True)
    assert chain is not None
    start = flat.initial().flat
    x = torch.from_numpy(rng.stream(1, 0, 0, "x").normal(size=(2, 3, 2, 7, 7)))
    y = torch.tensor([[0, 1, 2], [2, 1, 0]])
    one = chain.gradient(Point(flat.layout.views(start)), x, y, None, None)
    own = chain.gradient(Point(flat.layout.views(start.expand(2, -1))), x, y, None, None)
    assert torch.allclose(one[0], own[0])
    assert torch.allclose(one[1].dense(), own[1].dense(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten(), nn.Linear(50, 3)],
        [nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(50, 3)],
        [nn.Conv2d(1, 2, 3), nn.Linear(3, 3)],
        [nn.Linear(5, 5), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3)],
        [nn.Linear(5, 5), nn.Dropout(), nn.Linear(5, 3)],
        [nn.ReLU()],
    ],
)
def test_other_models_are_no_chain(layers: list[nn.Module]) -> None:
    assert Chain.of(model(*layers)) is None


@pytest.mark.parametrize(
    ("cores", "cohort", "block"), [(1, 3, 3), (2, 3, 1), (2, 10, 5), (2, 100, 5), (16, 10, 1)]
)
def test_models_of_images_make_small_blocks_for_all_cores(
    cores: int, cohort: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "available_cores", lambda: cores)
    choice = choose(images(), data((2, 7, 7), [9, 4, 6]), LocalProgram(batch_size=4), cohort)
    assert (choice.executor, choice.block_size) == ("batched", block)


def test_blocks_are_alike_or_their_clients_are() -> None:
    steps = np.array([1, 9, 2, 8, 3, 7])
    by_client, by_block = (blocks_of(steps, 3, alike) for alike in (True, False))
    assert [steps[b].tolist() for b in by_client] == [[9, 8, 7], [3, 2, 1]]
    assert [steps[b].tolist() for b in by_block] == [[9, 7, 2], [8, 3, 1]]


def test_clients_in_factors_make_bigger_blocks() -> None:
    given_data, small = data((5, 10), [4, 2, 3]), LocalProgram(batch_size=2)
    wide = model(nn.Flatten(), nn.Linear(50, 1000), nn.ReLU(), nn.Linear(1000, 3))
    assert choose(wide, given_data, small, 1000).block_size == 128
    assert choose(wide, given_data, replace(small, epochs=100), 1000).block_size == 12
    assert choose(wide, given_data, small, 10).block_size == 10


class Scales(LocalProgram):
    """Takes no gradient."""

    def step(self, s: LocalState, batch: Any) -> None:
        s.w.mul_(0.5)


def test_without_gradients_there_is_no_loss_and_no_refusal() -> None:
    flat, given_data = mlp(), data((5, 10), [2, 2])
    alone, block = both(flat, given_data, Scales(batch_size=2), 2)
    assert "loss" not in block.metrics
    assert torch.equal(ordered(block), alone)
