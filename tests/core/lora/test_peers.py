"""The other mergers, against dense products in float64 and, where it is right, against peft."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fedsim.core.errors import ConfigError
from fedsim.core.lora import (
    Factors,
    compact_svd,
    dare,
    ensemble,
    fedex,
    fedit,
    fedsa,
    ffa,
    flexlora,
    flora,
    hetlora,
    rolora,
    task_arithmetic,
    ties,
    trained_factor,
    truncated,
)
from fedsim.core.lora.federated import hetlora_penalty, hetlora_rank
from tests.core.lora.test_lego import IN, OUT, adapters, factors, relative, same

WEIGHTS = [1.0, 2.0, 5.0]
SHARES = [w / 8 for w in WEIGHTS]


def mean_delta(many: list[dict[str, Factors]], weights=SHARES) -> Tensor:
    return sum(w * a["m"].delta() for w, a in zip(weights, many, strict=True))  # type: ignore


def test_fedit_averages_the_factors() -> None:
    many = adapters(scaling=2.0)
    found = fedit(many, WEIGHTS)["m"]
    a = sum(w * x["m"].a for w, x in zip(SHARES, many, strict=True))
    b = sum(w * x["m"].b for w, x in zip(SHARES, many, strict=True))
    assert same(found.delta(), 2 * b @ a, 1e-14)
    assert relative(found.delta(), mean_delta(many)) > 0.1  # cross terms
    assert same(fedit([many[0]] * 3, WEIGHTS)["m"].delta(), many[0]["m"].delta(), 1e-14)


@pytest.mark.parametrize("method", [fedit, fedex, ffa, rolora, fedsa])
def test_equal_ranks_are_needed(method) -> None:
    with pytest.raises(ConfigError, match=r"ranks of m = \[3, 4\] must be equal"):
        method(adapters((3, 4)))
    with pytest.raises(ConfigError, match="must be equal"):
        method([{"m": factors(3, 0, 1.0)}, {"m": factors(3, 1, 2.0)}])


def test_flora_is_exact_for_any_ranks_and_scalings() -> None:
    many = [{"m": factors(r, r, s)} for r, s in ((2, 0.5), (3, 2.0), (5, 1.0))]
    found = flora(many, WEIGHTS)["m"]
    assert found.rank == 10
    assert same(found.delta(), mean_delta(many), 1e-13)


def test_weight_on_both_factors_would_be_wrong() -> None:
    many = adapters((2, 3, 5))
    twice = [{"m": Factors(a["m"].a * w, a["m"].b * w)} for w, a in zip(SHARES, many, strict=True)]
    both = sum(x["m"].delta() for x in twice)
    assert relative(both, mean_delta(many)) > 0.2


def test_flexlora_is_the_best_approximation_of_the_mean() -> None:
    many = [{"m": factors(r, r, s)} for r, s in ((2, 0.5), (3, 2.0), (4, 1.0))]
    exact = mean_delta(many)
    u, s, vt = torch.linalg.svd(exact)
    whole = flexlora(many, WEIGHTS)["m"]
    assert same(whole.delta(), exact, 1e-12)
    for rank in (1, 3, 6):
        best = u[:, :rank] * s[:rank] @ vt[:rank]
        found = flexlora(many, WEIGHTS, rank)["m"]
        assert same(found.delta(), best, 1e-12)
        assert same(truncated(whole, rank).delta(), best, 1e-12)
        scaled = flexlora(many, WEIGHTS, rank, scaling=16 / rank)["m"]
        assert scaled.scaling == 16 / rank
        assert same(scaled.delta(), best, 1e-12)
    assert torch.allclose(whole.a @ whole.a.T, torch.eye(9, dtype=torch.float64))


def test_compact_svd_of_wide_ranks() -> None:
    """More ranks than the matrix has."""
    f = factors(20, 0)
    u, s, vt = compact_svd(f)
    assert len(s) == min(IN, OUT)
    assert same(u * s @ vt, f.delta(), 1e-12)


def test_norm_without_the_product() -> None:
    f = factors(4, 1, scaling=-3.0)
    assert float(f.norm()) == pytest.approx(float(f.delta().norm()))


def test_hetlora_weighs_by_norm_and_pads() -> None:
    many = adapters((2, 4, 3))
    norms = [float(a["m"].delta().norm()) for a in many]
    a, b = torch.zeros(4, IN, dtype=torch.float64), torch.zeros(OUT, 4, dtype=torch.float64)
    for n, x in zip(norms, many, strict=True):
        r = x["m"].rank
        a[:r] += n / sum(norms) * x["m"].a
        b[:, :r] += n / sum(norms) * x["m"].b
    found = hetlora(many)["m"]
    assert same(found.a, a, 1e-13)
    assert same(found.b, b, 1e-13)
    small = truncated(found, 2)
    assert same(small.delta(), b[:, :2] @ a[:2], 1e-13)


def test_hetlora_of_untrained_adapters() -> None:
    many = [{"m": Factors(a["m"].a, 0 * a["m"].b)} for a in adapters()]
    assert same(hetlora(many)["m"].a, sum(a["m"].a for a in many) / 3, 1e-13)


def test_hetlora_prunes_itself_when_the_tail_shrank() -> None:
    before = factors(8, 0)
    a, b = before.a.clone(), before.b.clone()
    a[6:] *= 0.5
    after = Factors(a, b)
    dense = b[:, 6:].norm() * a[6:].norm()
    assert float(hetlora_penalty(a, b, 0.8)) == pytest.approx(float(dense))
    assert hetlora_rank(before, after, 0.8) == 6
    assert hetlora_rank(after, before, 0.8) == 8
    assert hetlora_rank(before, after, 1.0) == 8  # no tail
    with pytest.raises(ConfigError, match="gamma"):
        hetlora_rank(before, after, 0.0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fedex_residual_makes_fedit_exact(count: int) -> None:
    many, shares = adapters((4,) * count, scaling=2.0), SHARES[:count]
    total = sum(shares)
    means, residuals = fedex(many, shares)
    exact = mean_delta(many, [s / total for s in shares])
    assert same(means["m"].delta(), fedit(many, shares)["m"].delta(), 1e-14)
    assert same(means["m"].delta() + residuals["m"].delta(), exact, 1e-13)
    assert residuals["m"].rank == max(1, (count - 1) * 4)


def test_fedex_residual_has_the_shape_of_the_weight() -> None:
    """On a square layer a transposed residual would go unnoticed."""
    square = [{"m": Factors(a["m"].a, a["m"].b[:IN])} for a in adapters()]
    means, residuals = fedex(square)
    exact = mean_delta(square, [1 / 3] * 3)
    assert same(means["m"].delta() + residuals["m"].delta(), exact, 1e-13)
    assert relative(means["m"].delta() + residuals["m"].delta().T, exact) > 0.1


def test_ffa_is_exact_and_wants_a_shared_a() -> None:
    base = factors(4, 0)
    many = [{"m": Factors(base.a, factors(4, i).b)} for i in range(3)]
    assert same(ffa(many, WEIGHTS)["m"].delta(), mean_delta(many), 1e-13)
    assert torch.equal(ffa(many, WEIGHTS)["m"].a, base.a)
    with pytest.raises(ConfigError, match="A of m is frozen but differs"):
        ffa(adapters())


def test_rolora_is_exact_in_every_round() -> None:
    base = factors(4, 0)
    for number, letter in ((1, "b"), (2, "a"), (3, "b")):
        assert trained_factor(number) == letter
        many = []
        for i in range(3):
            own = factors(4, 10 + i)
            many.append({"m": Factors(base.a, own.b) if letter == "b" else Factors(own.a, base.b)})
        assert same(rolora(many, WEIGHTS, number)["m"].delta(), mean_delta(many), 1e-13)
        with pytest.raises(ConfigError, match="is frozen but differs"):
            rolora(many, WEIGHTS, number + 1)


def test_fedsa_shares_a_only() -> None:
    many = adapters()
    found = fedsa(many, WEIGHTS)
    a = sum(w * x["m"].a for w, x in zip(SHARES, many, strict=True))
    assert all(same(f["m"].a, a, 1e-14) for f in found)
    assert all(torch.equal(f["m"].b, x["m"].b) for f, x in zip(found, many, strict=True))


def test_task_arithmetic_and_ensemble() -> None:
    many = [{"m": factors(r, r, 0.5)} for r in (2, 3, 4)]
    total = sum(a["m"].delta() for a in many)
    assert same(task_arithmetic(many, coefficient=0.4)["m"].delta(), 0.4 * total, 1e-13)
    assert same(ensemble(many)["m"].delta(), total / 3, 1e-13)
    weighted = sum(w * a["m"].delta() for w, a in zip((1, -2, 3), many, strict=True))
    assert same(task_arithmetic(many, [1, -2, 3])["m"].delta(), weighted, 1e-13)
    best = flexlora(many, rank=3)["m"].delta()
    assert same(ensemble(many, rank=3)["m"].delta(), best, 1e-12)


def _ties_by_hand(stack: Tensor, density: float) -> Tensor:
    result = torch.zeros_like(stack[0])
    kept = []
    for x in stack:
        threshold = x.abs().flatten().sort(descending=True).values[int(density * x.numel()) - 1]
        kept.append(torch.where(x.abs() >= threshold, x, 0))
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            values = [float(x[i, j]) for x in kept]
            sign = 1 if sum(values) >= 0 else -1
            mine = [v for v in values if v * sign > 0]
            result[i, j] = sum(mine) / len(mine) if mine else 0
    return result


def test_ties_by_hand() -> None:
    many = adapters()
    found = ties(many, density=0.5)["m"]
    assert same(found.a, _ties_by_hand(torch.stack([a["m"].a for a in many]), 0.5), 1e-13)
    assert same(found.b, _ties_by_hand(torch.stack([a["m"].b for a in many]), 0.5), 1e-13)
    dense = _ties_by_hand(torch.stack([a["m"].delta() for a in many]), 0.3)
    whole = ties(many, density=0.3, space="product", rank=min(IN, OUT))["m"]
    assert same(whole.delta(), dense, 1e-12)
    mixed = ties(adapters((2, 3, 4)), space="product")["m"]
    assert mixed.rank == 4


def test_dare_keeps_the_expectation() -> None:
    many = adapters()
    exact = sum(a["m"].a for a in many)
    assert same(dare(many, density=1.0)["m"].a, exact, 1e-13)
    mean = sum(dare(many, density=0.5, seed=s)["m"].a for s in range(2000)) / 2000
    assert relative(mean, exact) < 0.05
    one, two, other = (dare(many, seed=s)["m"].a for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert same(dare(many, density=1.0, elect=True)["m"].a, ties(many, density=1.0)["m"].a)


# ------------------------------------------------------------------------ peft as an oracle


@pytest.fixture(scope="module")
def oracle():
    """A linear layer with three adapters in peft, and the same as factors."""
    peft = pytest.importorskip("peft")
    ranks, alphas = (4, 4, 4), (8, 4, 16)
    net = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False)).double()
    model, many = None, []
    for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"])
        if model is None:
            model = peft.get_peft_model(net, config, f"x{i}", autocast_adapter_dtype=False)
        else:
            model.add_adapter(f"x{i}", config)
        f = factors(r, i, alpha / r)
        layer = model.base_model.model[0].double()
        layer.lora_A[f"x{i}"].weight.data.copy_(f.a)
        layer.lora_B[f"x{i}"].weight.data.copy_(f.b)
        many.append({"m": f})
    return SimpleNamespace(model=model, layer=layer, many=many)


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        ("cat", lambda many, w: task_arithmetic(many, w)),
        ("svd", lambda many, w: task_arithmetic(many, w, rank=5)),
        ("ties", lambda many, w: ties(many, w, density=0.5)),
    ],
)
def test_same_as_peft(oracle, kind: str, ours) -> None:
    weights = [0.2, 0.3, 0.5]
    more = {"svd": {"svd_rank": 5}, "ties": {"density": 0.5}}.get(kind, {})
    names = ["x0", "x1", "x2"]
    oracle.model.add_weighted_adapter(names, weights, kind, combination_type=kind, **more)
    theirs = oracle.layer.get_delta_weight(kind)
    assert same(ours(oracle.many, weights)["m"].delta(), theirs, 1e-6)
