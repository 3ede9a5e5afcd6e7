"""FedKSeed and FedKSeed-Pro: the properties K1 to K16, the wire, the ledger."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.config import StrategyConfig
from fedsim.core import directions, kseed, zeroth
from fedsim.core.errors import ConfigError
from fedsim.core.packets import packet, packet_of
from fedsim.core.records import as_flat
from fedsim.federation import Federation
from strategies.fedkseed import FedKSeed, FedKSeedPro
from tests.contract import toy

PARAMS: dict[str, Any] = {"pool": 64, "steps": 12, "lr": 0.02, "eps": 1e-3}


def entry(name: str = "fedkseed", **params: Any) -> StrategyConfig:
    return StrategyConfig(name=name, params=PARAMS | params)


def federation(name: str = "fedkseed", options: Any = None, **params: Any) -> Federation:
    return toy.federation(entry(name, **params), **{"model": "mlp", **(options or {})})


def steps(
    w: torch.Tensor, count: int, lr: float, pool: int, seed: int, loss: Callable[[], float]
) -> np.ndarray:
    """Local steps on `w` as a client does them; the sums of scalar gradients [K]."""
    seeds = directions.pool(5, pool)
    sums = np.zeros(pool)
    for j in np.random.Generator(np.random.Philox(seed)).integers(pool, size=count):
        _, _, g = zeroth.two_point(w, int(seeds[j]), 1e-3, loss)
        directions.perturb(w, int(seeds[j]), 1e-3 - lr * g)
        sums[j] += g
    return sums


def quadratic(dtype: torch.dtype, d: int = 500) -> tuple[torch.Tensor, Callable[[], float]]:
    z = torch.from_numpy(np.random.Generator(np.random.Philox(1)).normal(size=(3, d)))
    w, curve, centre = z[0].to(dtype), z[1].abs().double(), z[2].double()
    return w, lambda: float((curve * (w.double() - centre) ** 2).sum() / 2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.float16, 3e-2),
        (torch.bfloat16, 0.15),
    ],
    ids=str,
)
def test_k1_rebuilding_gives_the_clients_own_model(dtype: torch.dtype, tolerance: float) -> None:
    """In half precision with a step that is not lost in rounding (a fixed slope)."""
    w, loss = quadratic(dtype)
    start = w.clone()
    seeds, sums = directions.pool(5, 32), np.zeros(32)
    half = dtype in (torch.float16, torch.bfloat16)
    if half:  # without perturbing: the local drift of half precision is not what is tested
        draw = np.random.Generator(np.random.Philox(2))
        for j, g in zip(draw.integers(32, size=40), draw.normal(size=40), strict=True):
            directions.perturb(w, int(seeds[j]), -0.05 * g)
            sums[j] += g
        lr = 0.05
    else:
        sums, lr = steps(w, 60, 1e-3, 32, 2, loss), 1e-3
    rebuilt = start.clone()
    kseed.rebuild(rebuilt, seeds, sums, lr, "gaussian")
    moved = (w.double() - start.double()).norm()
    assert moved > 0.1
    assert float((rebuilt.double() - w.double()).norm() / moved) <= tolerance


def test_k2_the_accumulators_are_the_mean_of_the_clients_models() -> None:
    w, loss = quadratic(torch.float64)
    start, shares, pool = w.clone(), np.array([0.5, 0.3, 0.2]), 32
    mean, sums = torch.zeros_like(w), np.zeros(pool)
    for client, share in enumerate(shares):
        w.copy_(start)
        sums += share * steps(w, 30, 1e-3, pool, client, loss)
        mean += share * w
    rebuilt = start.clone()
    kseed.rebuild(rebuilt, directions.pool(5, pool), sums, 1e-3, "gaussian")
    assert float((rebuilt - mean).norm() / (mean - start).norm()) < 1e-12


def test_k2_in_a_federation_the_model_is_the_mean_of_what_the_clients_reached() -> None:
    data = toy.federated(dtype=torch.float64)
    fed = federation(options={"data": data})
    progress = fed.begin()
    resident, reached = fed.env.model.resident, []
    grid: Any = fed.grid
    for message in toy.messages_of(fed, progress.arrays, 1):
        grid.execute(message)
        reached.append(resident.flat.clone())
    fed.advance(progress)
    served = fed.strategy.models(progress.arrays)["model"].arrays
    weights = torch.tensor(toy.SIZES, dtype=torch.float64)
    mean = (weights / weights.sum()) @ torch.stack(reached)
    start = fed.env.model.initial().flat
    moved = float((mean - start).norm())
    assert moved > 0.01
    assert float((as_flat(served).flat - mean).norm()) < 1e-6 * moved  # float32 on the wire


def test_k3_rebuilding_composes() -> None:
    draw, pool = np.random.Generator(np.random.Philox(3)), 20
    a, b = draw.normal(size=(2, pool))
    seeds, w0 = directions.pool(1, pool), torch.randn(300, dtype=torch.float64, generator=_gen())

    def built(w: torch.Tensor, sums: np.ndarray, order: Any = slice(None)) -> torch.Tensor:
        out = w.clone()
        kseed.rebuild(out, seeds[order], sums[order], 0.1, "gaussian")
        return out

    whole = built(w0, a + b)
    assert torch.allclose(built(built(w0, a), b), whole, rtol=0, atol=1e-12)
    assert torch.allclose(built(w0, a + b, draw.permutation(pool)), whole, rtol=0, atol=1e-12)
    assert torch.equal(built(w0, np.zeros(pool)), w0)
    some = np.where(np.arange(pool) % 2, a, 0.0)
    with_zeros = w0.clone()
    directions.combine(with_zeros, seeds, -0.1 * some)
    assert torch.equal(built(w0, some), with_zeros)


def _gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_k4_all_models_lie_in_the_span_of_the_directions() -> None:
    fed = federation(pool=3, steps=5, options={"data": toy.federated(dtype=torch.float64)})
    progress = fed.begin()
    moves = []
    for _ in range(6):
        fed.advance(progress)
        flat = as_flat(fed.strategy.models(progress.arrays)["model"].arrays).flat
        moves.append(flat - fed.env.model.initial().flat)
    values = torch.linalg.svdvals(torch.stack(moves))
    assert len(moves[0]) > 3
    assert float(values[3] / values[0]) < 1e-12


def test_k5_directions_are_the_same_in_another_process() -> None:
    code = (
        "import torch, hashlib; from fedsim.core import directions;"
        "z = directions.sample(2**40 + 7, 5000);"
        "print(hashlib.sha256(z.numpy().tobytes()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    }
    import hashlib

    z = directions.sample(2**40 + 7, 5000)
    assert runs == {hashlib.sha256(z.numpy().tobytes()).hexdigest()}
    w = torch.ones(5000)
    directions.perturb(w, 2**40 + 7, 1.0)
    assert torch.allclose(w - 1, z, atol=1e-6)
    other = directions.sample(2**40 + 8, 5000)
    assert abs(float(torch.corrcoef(torch.stack([z, other]))[0, 1])) < 5 / 5000**0.5


def test_k6_moments() -> None:
    d = 200_000
    z = directions.sample(3, d).double()
    assert abs(float(z.mean())) < 5 / d**0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / d) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 5 * (96 / d) ** 0.5


def test_k7_slope_times_direction_is_an_unbiased_gradient() -> None:
    d, n = 30, 4000
    draw = np.random.Generator(np.random.Philox(4))
    curve, at = draw.uniform(0.5, 2, d), draw.normal(size=d)
    gradient = curve * at
    z = np.stack([directions.sample(s, d).double().numpy() for s in range(n)])
    slopes = z @ gradient  # of a quadratic, for every eps (K8)
    error = np.linalg.norm((slopes[:, None] * z).mean(0) - gradient) / np.linalg.norm(gradient)
    predicted = ((d + 1) / n) ** 0.5
    assert predicted / 2 < error < 2 * predicted


def test_k8_the_slope_is_exact_on_a_quadratic_and_second_order_on_a_cubic() -> None:
    w, loss = quadratic(torch.float64)
    start = w.clone()
    z = directions.sample(9, len(w)).double()
    leaf = start.clone().requires_grad_()
    curve = torch.from_numpy(np.random.Generator(np.random.Philox(1)).normal(size=(3, 500)))
    value = (curve[1].abs() * (leaf - curve[2]) ** 2).sum() / 2
    (gradient,) = torch.autograd.grad(value, leaf)
    for eps in (1e-3, 1e-1, 1.0):
        w.copy_(start)
        _, _, g = zeroth.two_point(w, 9, eps, loss)
        assert g == pytest.approx(float(gradient @ z), rel=1e-8)

    def cubic(eps: float) -> float:
        w.copy_(start)
        return zeroth.two_point(w, 9, eps, lambda: float((w**3).sum()))[2]

    exact = float((3 * start**2) @ z)
    wide, narrow = abs(cubic(0.2) - exact), abs(cubic(0.1) - exact)
    assert wide / narrow == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("exact", [True, False])
def test_k9_perturbing_and_restoring(exact: bool) -> None:
    fed = federation(lr=0.0, options={"model": "mlp"})
    progress = fed.begin()
    (program,) = fed.env.programs.values()
    message = toy.messages_of(fed, progress.arrays, 1)[0]
    config = message.content.config_records["config"]
    config["exact_restore"] = exact
    grid: Any = fed.grid
    grid.execute(message)
    before, after = fed.env.model.initial().flat, fed.env.model.resident.flat
    assert program.resident
    if exact:
        assert torch.equal(after, before)
    assert float((after - before).norm() / before.norm()) <= 1e-6


def test_k10_probabilities_of_pro() -> None:
    totals, counts = np.array([6.0, 0.0, 5.0]), np.array([2.0, 0.0, 1.0])
    phi = kseed.amplitudes(totals, counts, True)
    assert phi.tolist() == [2.0, 0.0, 2.5]  # histories [0, 2, -4], [0], [0, 6], clipped at 5
    golden = [0.37442922, 0.16824189, 0.45732888]
    p = kseed.probabilities(phi)
    assert p == pytest.approx(golden, abs=1e-7)
    assert p.sum() == pytest.approx(1)
    assert p.max() / p.min() == pytest.approx(np.e, abs=1e-6)
    assert kseed.probabilities(3 * phi + 7) == pytest.approx(p, abs=1e-9)
    assert kseed.probabilities(np.full(4, 3.0)) == pytest.approx([0.25] * 4)
    assert (np.argsort(p) == np.argsort(phi)).all()
    pro = FedKSeedPro(amplitude_clip=5, pool=3)
    pro.observe(np.array([0, 0]), np.array([2.0, -4.0]))
    pro.observe(np.array([2]), np.array([6.0]))
    assert pro.chances() == pytest.approx(golden, abs=1e-7)
    assert FedKSeedPro(pool=5).chances() == pytest.approx([0.2] * 5)


def test_k11_packets() -> None:
    pool, tau = 4096, 200
    draw = np.random.Generator(np.random.Philox(5))
    sums = draw.normal(size=pool)
    pairs = [(int(j), float(g)) for j, g in zip(draw.integers(pool, size=tau), sums, strict=False)]
    down, up = kseed.pack_down(3, sums), kseed.pack_up(3, 17, pairs, pool)
    assert (len(down), len(up)) == (16_400, 1_220)
    assert len(down) + len(up) == 17_620 < 18_000
    assert len(kseed.pack_down(3, sums, np.abs(sums))) == 16 + 8 * pool
    found, none = kseed.read_down(down, pool)
    assert none is None
    assert (found == sums.astype(np.float32)).all()
    minibatches, places, scalars = kseed.read_up(up, pool, tau, 3)
    assert minibatches == 17
    assert places.tolist() == [j for j, _ in pairs]
    assert (scalars == np.float32([g for _, g in pairs]).astype(float)).all()
    assert len(kseed.pack_up(3, 17, pairs[:7], pool)) == 20 + 6 * 7
    assert packet_of(packet(up)) == up
    for model in ("softmax", "mlp"):  # the size does not depend on the model
        fed = federation(options={"model": model})
        (message, *_) = toy.messages_of(fed, fed.begin().arrays, 1)
        assert len(packet_of(message.content.array_records["arrays"])) == 16 + 4 * 64
        (content,) = toy.contents_of(fed, [message])
        assert len(packet_of(content.array_records["arrays"])) == 20 + 6 * 12


def test_k12_a_client_that_was_away_has_the_same_model() -> None:
    fed = federation(options={"rounds": 51, "evaluate": {"every": 51, "clients": False}}, steps=2)
    progress = fed.begin()
    for _ in range(50):
        fed.advance(progress)
    always = fed.env.model.resident
    message = toy.messages_of(fed, progress.arrays, 51)[2]
    message.metadata.__dict__["_message_type"] = "evaluate.fedkseed"
    grid: Any = fed.grid
    grid.execute(message)
    away = federation(steps=2)  # has seen nothing so far
    other: Any = away.grid
    with directions.count_draws() as draws:
        other.execute(message)
    assert draws.total <= 64 * len(always.flat)
    assert torch.equal(away.env.model.resident.flat, always.flat)


@pytest.mark.parametrize("name", ["fedkseed", "fedkseed_pro"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_decay": 0.1},
        {"lr_decay": 0.99},
        {"basis": "uniform"},
        {"pool": 0},
        {"steps": 0},
        {"eps": 0.0},
        {"rebuild": "sometimes"},
    ],
    ids=str,
)
def test_k13_what_seeds_cannot_express_is_refused(name: str, wrong: dict[str, Any]) -> None:
    made = {"fedkseed": FedKSeed, "fedkseed_pro": FedKSeedPro}[name]
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        made(**wrong)


@pytest.mark.parametrize("key", ["weight_decay", "momentum"])
def test_k13_training_options_too(key: str) -> None:
    fed = federation(options={"train": {key: 0.1}})
    with pytest.raises(ConfigError, match=f"train.{key}"):
        fed.advance(fed.begin())


def test_k14_discarded_steps_leave_no_trace() -> None:
    fed = federation(loss_clip=1e-12)
    progress = toy.run(fed, 1)
    assert progress.rounds[1]["admitted"] == 7
    assert progress.rounds[1]["discarded"] == 12
    assert not from_sums(progress.arrays).any()
    fed = federation("fedkseed_pro")
    poison = fed.env.data.fields["x"]
    kept = poison.clone()
    poison.fill_(float("nan"))
    progress = fed.begin()
    messages = toy.messages_of(fed, progress.arrays, 1)
    contents = toy.contents_of(fed, messages)
    assert all(len(packet_of(c.array_records["arrays"])) == 20 for c in contents)
    moved = fed.env.model.resident.flat - fed.env.model.initial().flat
    assert float(moved.abs().max()) < 1e-5
    poison.copy_(kept)


def from_sums(record: Any) -> np.ndarray:
    found: np.ndarray = as_flat(record).flat.numpy()
    return found


def test_k15_global_generators_are_left_alone() -> None:
    fed = federation()
    progress = fed.begin()
    messages = toy.messages_of(fed, progress.arrays, 1)
    before = (
        torch.get_rng_state(),
        np.random.get_state()[1].tobytes(),  # type: ignore[index,union-attr]  # noqa: NPY002
        random.getstate(),
    )
    toy.contents_of(fed, messages)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]  # type: ignore[index,union-attr]  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.parametrize("basis", ["gaussian", "rademacher", "rademacher32"])
@pytest.mark.parametrize("name", ["fedkseed", "fedkseed_pro"])
def test_k16_the_loss_falls(name: str, basis: str) -> None:
    progress = toy.run(federation(name, basis=basis, options={"rounds": 5}))
    losses = [r["loss"] for r in progress.rounds]
    assert losses[-1] < 0.6 * losses[0]


def test_k16_without_a_learning_rate_nothing_moves() -> None:
    fed = federation(lr=0.0)
    progress = toy.run(fed, 2)
    assert progress.rounds[2]["loss"] == progress.rounds[0]["loss"]
    assert from_sums(progress.arrays).any()


def test_three_walks_and_two_passes_a_step() -> None:
    fed = federation(steps=5)
    message = toy.messages_of(fed, fed.begin().arrays, 1)[0]
    calls: list[int] = []
    outputs = fed.env.model.outputs
    fed.env.model.outputs = lambda *a, **k: (calls.append(1), outputs(*a, **k))[1]  # type: ignore[method-assign]
    with directions.count_draws() as draws:
        toy.contents_of(fed, [message])
    assert draws.total == 3 * 5 * len(fed.env.model.resident.flat)
    assert len(calls) == 2 * 5
