"""Adapters of differently pruned models: cutting, putting back, and the means by coordinate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsim.core.lora.factors import Factors, truncated
from fedsim.core.lora.federated import fedit, flexlora
from fedsim.core.lora.pruned import Sides, aggregate, cut, moved, restored, revived
from fedsim.core.lora.serving import halves
from fedsim.core.model import FlatModel
from tests.contract.toy import module

OUT, IN, RANK = 6, 5, 3
ROWS: Sides = ({"m": torch.tensor([0, 2, 3])}, {})
COLUMNS: Sides = ({}, {"m": torch.tensor([1, 4])})
BOTH: Sides = ({"m": torch.tensor([0, 2, 3])}, {"m": torch.tensor([1, 4])})
NOTHING: Sides = ({}, {})


def factors(seed: int, sides: Sides = NOTHING, rank: int = RANK) -> Factors:
    """Random factors, zero where pruned."""
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, IN, generator=draw, dtype=torch.float64)
    b = torch.randn(OUT, rank, generator=draw, dtype=torch.float64)
    rows, columns = (torch.zeros(n, dtype=torch.float64) for n in (OUT, IN))
    rows[sides[0].get("m", torch.arange(OUT))] = 1
    columns[sides[1].get("m", torch.arange(IN))] = 1
    return Factors(a * columns, b * rows[:, None])


def held(sides: Sides) -> Tensor:
    """Which coordinates of the product a client has."""
    return (torch.outer(*(factors_mask(sides))) > 0).double()


def factors_mask(sides: Sides) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.zeros(n, dtype=torch.float64) for n in (OUT, IN))
    rows[sides[0].get("m", torch.arange(OUT))] = 1
    columns[sides[1].get("m", torch.arange(IN))] = 1
    return rows, columns


def merged(
    sides: list[Sides], ranks: list[int], rank: int, **options: str
) -> tuple[Factors, Tensor, Tensor]:
    """The result, and the mean of products by coordinate computed with dense matrices."""
    mine = [factors(i, s, r) for i, (s, r) in enumerate(zip(sides, ranks, strict=True))]
    weights = [1.0 + i for i in range(len(mine))]
    before = factors(99)
    found = aggregate([{"m": f} for f in mine], weights, sides, {"m": before}, rank, **options)["m"]
    total = sum(weights)
    masks = torch.stack([w / total * held(s) for w, s in zip(weights, sides, strict=True)]).sum(0)
    mean = torch.stack([w / total * f.delta() for w, f in zip(weights, mine, strict=True)]).sum(0)
    return found, mean, masks


@pytest.mark.parametrize(
    "sides",
    [
        [ROWS, NOTHING], [COLUMNS, NOTHING], [BOTH, NOTHING], [ROWS, COLUMNS], [ROWS, ROWS],
        [BOTH, BOTH],
    ],
    ids=["rows", "columns", "both", "mixed", "same rows", "same both"],
)  # fmt: skip
@pytest.mark.parametrize("missing", ["renormalise", "keep_global"])
def test_dense_is_the_mean_by_coordinate(sides: list[Sides], missing: str) -> None:
    """At full rank nothing is cut, so the product is the dense oracle's."""
    found, mean, masks = merged(sides, [3, 2], min(OUT, IN), missing=missing)
    old = factors(99).delta()
    if missing == "renormalise":
        wanted = torch.where(masks > 0, mean / masks.clamp_min(1e-300), old)
    else:
        wanted = mean + (1 - masks) * old
    assert torch.allclose(found.delta(), wanted, atol=1e-9)


def test_dense_is_cut_to_the_best_rank() -> None:
    found, mean, masks = merged([ROWS, NOTHING], [3, 3], 2)
    wanted = mean / masks
    _, s, _ = torch.linalg.svd(wanted)
    off = torch.linalg.matrix_norm(found.delta() - wanted)
    assert off == pytest.approx(float(s[2:].square().sum().sqrt()))


def test_ranks_shrink_to_the_best_of_that_rank_and_grow_without_a_change() -> None:
    """What `dense` gives is cut to a client's rank; zero ranks behind it change no product."""
    found, _, _ = merged([ROWS, NOTHING], [3, 3], min(OUT, IN))
    whole = found.delta()
    u, s, vt = torch.linalg.svd(whole)
    for rank in (1, 2, 3):
        small = truncated(found, rank)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert torch.allclose(small.delta(), best, atol=1e-9)
        grown = truncated(small, 5)
        assert grown.a.shape[0] == 5
        assert torch.equal(grown.delta(), small.delta())


def test_without_pruning_dense_is_flexlora_and_pad_is_fedit() -> None:
    adapters = [{"m": factors(i)} for i in range(3)]
    weights, nothing, before = [1.0, 2.0, 4.0], [NOTHING] * 3, {"m": factors(99)}
    dense = aggregate(adapters, weights, nothing, before, RANK)["m"]
    pad = aggregate(adapters, weights, nothing, before, RANK, "pad")["m"]
    for mine, theirs in (
        (dense, flexlora(adapters, weights, RANK)["m"]), (pad, fedit(adapters, weights)["m"])
    ):  # fmt: skip
        assert torch.equal(mine.a, theirs.a)
        assert torch.equal(mine.b, theirs.b)


@pytest.mark.parametrize("method", ["dense", "pad"])
@pytest.mark.parametrize("sides", [ROWS, COLUMNS, BOTH], ids=["rows", "columns", "both"])
def test_identical_clients_get_back_what_they_have(method: str, sides: Sides) -> None:
    mine, before = factors(0, sides), factors(99)
    found = aggregate([{"m": mine}] * 3, [1.0, 1.0, 2.0], [sides] * 3, {"m": before}, 5, method)[
        "m"
    ]
    there = held(sides) > 0
    if method == "pad":  # rows and columns that nobody has keep theirs, also in the product
        assert torch.allclose(found.a[:RANK][:, there.any(0)], mine.a[:, there.any(0)])
        assert torch.allclose(found.b[:, :RANK][there.any(1)], mine.b[there.any(1)])
    else:
        assert torch.allclose(found.delta()[there], mine.delta()[there])
        assert torch.allclose(found.delta()[~there], before.delta()[~there])


def test_pad_averages_a_rank_over_those_who_have_it() -> None:
    """Ranks 3 and 1 with weights 1 and 2: the third rank is the first client's alone."""
    one, two = factors(0), factors(1, rank=1)
    found = aggregate(
        [{"m": one}, {"m": two}], [1.0, 2.0], [NOTHING] * 2, {"m": factors(99)}, 3, "pad"
    )["m"]
    assert torch.allclose(found.a[0], (one.a[0] + 2 * two.a[0]) / 3)
    assert torch.allclose(found.a[2], one.a[2])


def test_lego_takes_the_factors_as_they_are() -> None:
    found = aggregate(
        [{"m": factors(0, ROWS)}, {"m": factors(1, rank=1)}], [1.0, 1.0], [ROWS, NOTHING],
        {"m": factors(99)}, 3, "lego",
    )["m"]  # fmt: skip
    assert (found.a.shape, found.b.shape) == ((3, IN), (OUT, 3))
    assert torch.isfinite(found.delta()).all()


def test_the_order_of_clients_does_not_matter() -> None:
    sides, adapters = [ROWS, COLUMNS, NOTHING], [{"m": factors(i)} for i in range(3)]
    one = aggregate(adapters, [1.0, 2.0, 3.0], sides, {"m": factors(99)}, 5)["m"]
    two = aggregate(adapters[::-1], [3.0, 2.0, 1.0], sides[::-1], {"m": factors(99)}, 5)["m"]
    assert torch.allclose(one.delta(), two.delta())


def test_cut_and_restored() -> None:
    """What is left comes back exactly; the rest is zero."""
    model = FlatModel(module("prunable"), lambda *_: torch.zeros(()))  # type: ignore[arg-type]
    info, pairs = model.info, halves(model.info)
    assert info.structures is not None
    left = torch.tensor([True, False, True, True, False])
    kept = {"2.channels": left}
    state = {n: torch.randn_like(t) for n, t in model.initial().state().items()}
    small = cut(state, info, pairs, kept, 1)
    shapes = dict(zip(small.layout.names, small.layout.shapes, strict=True))
    assert shapes["0.lora_B"] == (3, 1)
    assert shapes["2.lora_A"] == (1, 3)
    assert not any("gate" in name for name in shapes)
    back = restored(small.state(), info, pairs, kept)
    assert torch.equal(back["0.lora_B"][left], state["0.lora_B"][left, :1])
    assert not back["0.lora_B"][~left].any()
    assert torch.equal(back["2.lora_A"][:, left], state["2.lora_A"][:1, left])
    assert not back["2.lora_A"][:, ~left].any()


def test_moved_is_the_norm_of_the_difference_of_products() -> None:
    one, two = factors(0), factors(1, rank=2)
    wanted = torch.linalg.matrix_norm(one.delta() - two.delta())
    assert moved({"m": one}, {"m": two}) == pytest.approx(float(wanted))


def test_a_dead_rank_begins_anew() -> None:
    """Zero in both factors, its gradients would be zero for ever; the product does not change."""
    f, first = factors(0), factors(1)
    f.a[1], f.b[:, 1] = 0.0, 0.0
    found = revived({"m": f}, {"m": first})["m"]
    assert torch.equal(found.a[1], first.a[1])
    assert torch.equal(found.delta(), f.delta())
