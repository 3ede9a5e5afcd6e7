"""Ferret: the properties F1 to F16, the wire, the ledger."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedsim.config import StrategyConfig
from fedsim.core import directions, ferret
from fedsim.core.packets import packet_of
from fedsim.core.records import as_flat
from fedsim.federation import Federation
from tests.contract import toy


def federation(options: Any = None, **params: Any) -> Federation:
    entry = StrategyConfig(name="ferret", params={"bases": 16} | params)
    return toy.federation(entry, **{"model": "mlp", **(options or {})})


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    draw = np.random.Generator(np.random.Philox(seed))
    return torch.from_numpy(draw.normal(size=shape)).to(dtype)


def estimate(
    delta: torch.Tensor, bases: int, blocks: list[int] | None = None, **options: Any
) -> torch.Tensor:
    """The update that the server takes for `delta`."""
    blocks = blocks or [len(delta)]
    basis = options.get("basis", "uniform")
    seeds = directions.pool(options.pop("master", 0), bases)
    counts = np.full(len(blocks), bases)
    found = ferret.project(delta, seeds, blocks, counts, **options)
    out = torch.zeros_like(delta)
    ferret.add(out, seeds, blocks, found, basis)
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("basis", ["uniform", "truncated"])
def test_f1_adjoint(basis: str, dtype: torch.dtype, tolerance: float) -> None:
    blocks, bases = [700, 1, 299], 12
    x = normal(1000, dtype=dtype)
    gamma = normal(3, bases, seed=1).numpy()
    seeds, counts = directions.pool(7, bases), np.array([12, 5, 9])
    gamma[np.arange(bases) >= counts[:, None]] = 0
    out = torch.zeros_like(x)
    ferret.add(out, seeds, blocks, gamma, basis)
    found = ferret.project(x, seeds, blocks, counts, basis)
    left = float((out.double() * x.double()).sum())
    right = float((gamma * found / ferret.factors(blocks, counts, basis)[:, None]).sum())
    assert left == pytest.approx(right, rel=tolerance)


def test_f2_unbiased_and_the_official_factor_is_a_third() -> None:
    delta, bases = normal(300), 200
    square = float(delta @ delta)

    def ratios(**options: Any) -> np.ndarray:
        found = [estimate(delta, bases, master=m, **options) for m in range(50)]
        return np.array([float(e @ delta) / square for e in found])

    unbiased, official = ratios(), ratios(scaling="official")
    bound = 5 * math.sqrt(2 / bases)
    assert (np.abs(unbiased - 1) < bound).all()
    assert abs(unbiased.mean() - 1) < bound / math.sqrt(50)
    assert abs(official.mean() - 1) > bound
    assert official.mean() == pytest.approx(1 / 3, rel=0.1)


@pytest.mark.parametrize(("d", "bases"), [(1000, 1000), (500, 5000)])
def test_f3_f4_error_and_angle(d: int, bases: int) -> None:
    delta = normal(d)
    found = [estimate(delta, bases, master=m) for m in range(10)]
    norm = float(delta.norm())
    square = np.mean([float((e - delta).norm()) ** 2 for e in found]) / norm**2
    assert square == pytest.approx((d - 0.2) / bases, rel=0.15)
    angle = np.mean([float(e @ delta) / norm / float(e.norm()) for e in found])
    assert angle == pytest.approx(1 / math.sqrt(1 + d / bases), rel=0.1)


@pytest.mark.parametrize("basis", ["uniform", "truncated"])
def test_f5_bases(basis: str) -> None:
    d = 10_000
    v = directions.sample(3, d, basis=basis).double()
    assert float(v.abs().max()) <= 1 / math.sqrt(d)
    assert float(v.norm()) == pytest.approx(1 / math.sqrt(3), rel=0.02)
    scaled = (v * math.sqrt(d)).numpy()
    assert stats.kstest(scaled, stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_f6_rho() -> None:
    golden = {10: 0.98673058, 100: 0.99866730, 10_000: 0.99998667}
    for d, value in golden.items():
        assert 3 * d * directions.variance("truncated", d) == pytest.approx(value, abs=1e-7)
    for d in (100, 999, 1000, 10**6):
        exact = directions.variance("truncated", d)
        assert exact == pytest.approx(1 / (3 * d) - 2 / (45 * d * d), rel=1e-6)
    z = torch.cat([directions.sample(s, 10, basis="truncated") for s in range(20_000)])
    assert float(z.double().var()) == pytest.approx(directions.variance("truncated", 10), rel=0.01)


def test_f7_linear_and_means_commute() -> None:
    blocks, bases, counts = [60, 40], 9, np.array([9, 4])
    seeds = directions.pool(1, bases)
    a, b = normal(100, seed=1), normal(100, seed=2)

    def project(x: torch.Tensor) -> np.ndarray:
        return ferret.project(x, seeds, blocks, counts)

    together = project(2 * a - 3 * b)
    assert np.allclose(together, 2 * project(a) - 3 * project(b), rtol=0, atol=1e-10)

    def back(gamma: np.ndarray) -> torch.Tensor:
        out = torch.zeros(100, dtype=torch.float64)
        ferret.add(out, seeds, blocks, gamma)
        return out

    mean = back((project(a) + project(b)) / 2)
    assert torch.allclose(mean, (back(project(a)) + back(project(b))) / 2, rtol=0, atol=1e-10)


def llama(layers: int, width: int, middle: int, vocabulary: int = 32_000) -> list[int]:
    layer = [width * width] * 4 + [width * middle] * 3 + [width] * 2
    return [vocabulary * width, *layer * layers, width, vocabulary * width]


def test_f8_blocks() -> None:
    shapes = {
        194: llama(24, 2048, 5461),
        210: llama(26, 3200, 8640),
        258: llama(32, 4096, 11_008),
        322: llama(40, 5120, 13_824),
    }
    assert sum(shapes[210]) == 3_426_473_600
    for count, sizes in shapes.items():
        blocks = ferret.blocks_of(sizes)
        assert len(blocks) == count
        assert sum(blocks) == sum(sizes)
    assert [len(ferret.blocks_of(shapes[194], m)) for m in (3, 6)] == [122, 62]
    assert ferret.blocks_of([7]) == [7]


def test_f9_numbers_of_bases() -> None:
    assert ferret.counts_of([3, 1.5, 0.01], 200).tolist() == [200, 100, 2]
    assert ferret.counts_of([0, 0], 200).tolist() == [2, 2]
    assert ferret.counts_of([1.0], 1).tolist() == [1]
    total = ferret.counts_of([3, 1, 1], 100, "total")
    assert total.tolist() == [60, 20, 20]
    draw = np.abs(normal(40).numpy())
    counts = ferret.counts_of(draw, 50)
    assert counts[draw.argmax()] == 50
    assert (counts >= 2).all()
    assert (counts <= 50).all()


def test_f10_many_bases_give_the_update_itself() -> None:
    delta, bases = normal(20), 40_000
    errors = [
        float((estimate(delta, bases, master=m) - delta).norm() / delta.norm()) for m in range(10)
    ]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(math.sqrt(20 / bases), rel=0.2)


def test_f11_the_mean_over_bases_is_fedavg(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an orthonormal basis (a test double) a round is FedAvg's."""

    def project(delta: torch.Tensor, seeds: Any, blocks: Any, counts: Any, *_: Any) -> np.ndarray:
        return np.stack([delta.numpy()])

    def add(w: torch.Tensor, seeds: Any, blocks: Any, coordinates: np.ndarray, *_: Any) -> None:
        w += torch.from_numpy(coordinates[0])

    data = toy.federated(dtype=torch.float64)
    fed = federation(
        {"data": data, "model": "softmax"}, bases=15, multiple=0, weighted=True
    )  # 15 parameters
    monkeypatch.setattr(ferret, "project", project)
    monkeypatch.setattr(ferret, "add", add)
    found = toy.run(fed, 2)
    entry = StrategyConfig(name="fedavg")
    expected = toy.run(toy.federation(entry, data=data, model="softmax"), 2)
    assert found.rounds[-1]["loss"] == pytest.approx(expected.rounds[-1]["loss"], rel=1e-6)


def test_f11_one_client_one_step_in_the_mean_is_an_sgd_step() -> None:
    data = toy.federated(toy.SIZES[:1], dtype=torch.float64)
    options = {"data": data, "model": "softmax", "train": {"max_steps": 1}}
    fed = toy.federation(StrategyConfig(name="fedavg"), **options)
    progress = fed.begin()
    start = as_flat(progress.arrays).flat.clone()
    fed.advance(progress)
    step = as_flat(progress.arrays).flat - start
    fed = federation(options, bases=400)
    progress = fed.begin()
    fed.advance(progress)
    moved = as_flat(fed.strategy.models(progress.arrays)["model"].arrays).flat - start
    error = float((moved - step).norm() / step.norm())
    assert error < 3 * math.sqrt(15 / 400)


def test_f12_blocks_keep_the_error_and_divide_the_work() -> None:
    d, bases, delta = 1024, 256, normal(1024)
    errors, work = [], []
    for count in (1, 4, 16):
        blocks = [d // count] * count
        with directions.count_draws() as draws:
            found = [estimate(delta, bases // count, blocks, master=100 * m + 1) for m in range(12)]
        errors.append(np.mean([float((e - delta).norm() / delta.norm()) ** 2 for e in found]))
        work.append(draws.total)
    assert errors == pytest.approx([d / bases] * 3, rel=0.2)
    assert work == [work[0], work[0] // 4, work[0] // 16]


def test_f13_packets_and_the_same_bases_in_another_process(tmp_path: Path) -> None:
    blocks, bases = [30, 50, 20], 8
    counts = np.array([8, 3, 2])
    delta, seeds = normal(100), ferret.seeds_of(77, 0, bases)
    found = ferret.project(delta, seeds, blocks, counts)
    up = ferret.pack_up(4, 31, found, counts)
    assert len(up) == 20 + 2 * 3 + 4 * 13
    examples, back = ferret.read_up(up, 3, bases, 4)
    assert examples == 31
    assert np.array_equal(back, found.astype(np.float32).astype(float))
    half = ferret.pack_up(4, 31, found, counts, half=True)
    assert len(half) == 20 + 6 * 3 + 2 * 13
    scales = np.abs(found).max(1, keepdims=True)
    assert np.abs(ferret.read_up(half, 3, bases)[1] - found).max() < 1e-3 * scales.max()
    down = ferret.pack_down(4, {0: back})
    assert len(down) == 16 + 4 + 2 * 3 + 4 * 13
    assert np.array_equal(ferret.read_down(down, 3, bases)[0], back)
    file = tmp_path / "packet"
    file.write_bytes(down)
    code = (
        "import sys, pathlib, torch, hashlib; from fedsim.core import ferret;"
        "data = pathlib.Path(sys.argv[1]).read_bytes(); w = torch.zeros(100);"
        "ferret.add(w, ferret.seeds_of(77, 0, 8), [30, 50, 20],"
        " ferret.read_down(data, 3, 8)[0]);"
        "print(hashlib.sha256(w.numpy().tobytes()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    import hashlib

    w = torch.zeros(100)
    ferret.add(w, seeds, blocks, back)
    assert other.stdout.strip() == hashlib.sha256(w.numpy().tobytes()).hexdigest()


def test_f14_the_server_moves_towards_what_clients_found() -> None:
    fed = federation(bases=200)
    progress = fed.begin()
    start = fed.env.model.initial().flat
    ends = []
    grid: Any = fed.grid
    for message in toy.messages_of(fed, progress.arrays, 1):
        grid.execute(message)
        ends.append(fed.env.model.resident.flat.clone())
    fed.advance(progress)
    moved = as_flat(fed.strategy.models(progress.arrays)["model"].arrays).flat - start
    wanted = torch.stack(ends).mean(0) - start
    ratio = float(moved @ wanted / (wanted @ wanted))
    assert 0.5 < ratio < 1.5


def test_f15_half_precision_updates_are_not_lost() -> None:
    d = 1 << 20
    delta = normal(d, dtype=torch.float32).mul_(1e-5).half()
    seeds, counts = directions.pool(0, 32), np.array([32])
    found = ferret.project(delta, seeds, [d], counts)
    exact = ferret.project(delta.double(), seeds, [d], counts)
    assert (found != 0).all()
    assert np.abs(found - exact).max() < 1e-2 * exact.std()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_f15_half_precision_weights_get_master_weights(dtype: torch.dtype) -> None:
    data = toy.federated(dtype=dtype)
    options = {"data": data, "train": {"lr": 1e-4, "momentum": 0.5}}
    fed = federation(options, bases=100)
    message = toy.messages_of(fed, fed.begin().arrays, 1)[0]
    (content,) = toy.contents_of(fed, [message])
    data32 = toy.federated()
    twin = federation({**options, "data": data32}, bases=100)
    (reference,) = toy.contents_of(twin, toy.messages_of(twin, twin.begin().arrays, 1)[:1])
    blocks = len(fed.strategy.blocks)  # type: ignore[attr-defined]
    found, expected = (
        ferret.read_up(packet_of(c.array_records["arrays"]), blocks, 100)[1]
        for c in (content, reference)
    )
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(expected), rel=0.2)


def test_f16_global_generators_are_left_alone() -> None:
    fed = federation()
    messages = toy.messages_of(fed, fed.begin().arrays, 1)
    before = (
        torch.get_rng_state(),
        np.random.get_state()[1].tobytes(),  # type: ignore[index,union-attr]  # noqa: NPY002
        random.getstate(),
    )
    toy.contents_of(fed, messages)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]  # type: ignore[index,union-attr]  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"fresh": "round"},
        {"fresh": "client", "half": True},
        {"momentum": 0.5, "server_lr": 0.5, "budget": "total", "bases": 64},
        {"basis": "truncated", "scaling": "official", "server_lr": 3.0},
        {"multiple": 0.0, "weighted": True},
    ],
    ids=str,
)
def test_the_loss_falls(params: dict[str, Any]) -> None:
    progress = toy.run(federation({"rounds": 5}, **params))
    losses = [r["loss"] for r in progress.rounds]
    assert losses[-1] < 0.8 * losses[0]
    assert progress.rounds[-1]["refused"] == 0
