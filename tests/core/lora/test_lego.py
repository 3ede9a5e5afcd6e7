"""LoRA-LEGO: what it keeps, and what it is documented not to keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.core.errors import ConfigError
from fedsim.core.lora import Factors, Lego, fedit, lego, scaling_of
from fedsim.core.lora.factors import concatenated

OUT, IN = 14, 11
PLAIN = Lego(parameter_reweight=False, output_reweight=False)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factors(rank: int, seed: int, scaling: float = 1.0) -> Factors:
    g = draw(seed)
    a = torch.randn(rank, IN, generator=g, dtype=torch.float64)
    return Factors(a, torch.randn(OUT, rank, generator=g, dtype=torch.float64), scaling)


def adapters(ranks: tuple[int, ...] = (4, 4, 4), **more: float) -> list[dict[str, Factors]]:
    return [{"m": factors(r, i, **more)} for i, r in enumerate(ranks)]


def merged(many: list[dict[str, Factors]], weights=None, **options) -> Tensor:
    return lego(many, Lego(**options), weights)["m"].factors.delta()


def permuted(f: Factors, order: list[int]) -> Factors:
    return Factors(f.a[order], f.b[:, order], f.scaling)


def separated(copies: int = 5, rank: int = 4, noise: float = 1e-3) -> list[dict[str, Factors]]:
    """Noisy copies of one adapter, with ranks in an order of their own."""
    base, many = factors(rank, 99), []
    for i in range(copies):
        f = factors(rank, 200 + i)
        near = Factors(base.a + noise * f.a, base.b + noise * f.b)
        order = np.random.default_rng(i).permutation(rank).tolist()
        many.append({"m": permuted(near, order)})
    return many


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def same(x: Tensor, y: Tensor, tolerance: float = 1e-10) -> bool:
    return relative(x, y) < tolerance


def total(many: list[dict[str, Factors]]) -> Tensor:
    return sum(a["m"].delta() for a in many)  # type: ignore[return-value]


# ------------------------------------------------------------------------ what it keeps


@pytest.mark.parametrize("options", [{}, {"rank": 6}, {"rank": "sum"}, {"feature": "unit"}])
def test_order_of_ranks_and_of_adapters_does_not_matter(options: dict) -> None:
    for many in (separated(), adapters((3, 4, 5))):
        before = merged(many, **options)
        turned = [{"m": permuted(a["m"], list(range(a["m"].rank))[::-1])} for a in many]
        assert same(merged(turned, **options), before)
        assert same(merged(many[::-1], **options), before)


def test_concatenation_is_summation() -> None:
    many = [factors(3, 0, 0.5), factors(5, 1, 2.0)]
    dense = 0.3 * many[0].delta() + 0.7 * many[1].delta()
    assert same(concatenated(many, [0.3, 0.7]).delta(), dense, 1e-14)


def test_all_ranks_kept_is_the_sum() -> None:
    many = adapters((4, 4, 4))
    assert same(merged(many, rank="sum", output_reweight=False), total(many))
    assert same(merged(many, rank="sum"), total(many) / math.sqrt(3))
    assert same(merged(many, rank=12), total(many) / math.sqrt(3))


def test_copies_of_one_adapter_give_it_back() -> None:
    one = factors(4, 3, scaling=2.0)
    many = [{"m": permuted(one, order)} for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0])]
    result = lego(many)["m"]
    assert same(result.factors.delta(), one.delta())
    assert result.gamma == pytest.approx((1.0,) * 4, abs=1e-12)
    assert result.sizes == (3, 3, 3, 3)
    naive = fedit(many)["m"].delta()
    assert relative(naive, one.delta()) > 0.4


def test_mass_is_the_weighted_mean_for_any_ranks() -> None:
    many, weights = adapters((2, 3, 5)), [1.0, 2.0, 5.0]
    mean = sum(w / 8 * a["m"].delta() for w, a in zip(weights, many, strict=True))
    for pr in (False, True):
        assert same(merged(many, weights, mass=True, rank="sum", parameter_reweight=pr), mean)
    copies = [{"m": factors(4, 3)}] * 3
    assert same(merged(copies, weights, mass=True), factors(4, 3).delta())


@pytest.mark.parametrize("norm", ["inf", "l2"])
def test_parameter_reweighting_restores_the_members_norm(norm: str) -> None:
    many, kind = adapters((4, 3, 4)), math.inf if norm == "inf" else 2
    result = lego(many, Lego(rank=3, norm=norm, output_reweight=False))["m"]
    units = torch.cat([torch.cat([a["m"].a, a["m"].b.T], 1) for a in many])
    rows = torch.cat([result.factors.a, result.factors.b.T], 1)
    for c in range(3):
        mine = units[torch.tensor(result.labels) == c]
        wanted = torch.linalg.vector_norm(mine, kind, dim=1).mean()
        assert float(torch.linalg.vector_norm(rows[c], kind)) == pytest.approx(float(wanted))
    assert min(result.gamma) >= 1 - 1e-12


def test_gamma_is_cut() -> None:
    many = adapters()
    plain, cut = (
        lego(many, Lego(rank=2, output_reweight=False, gamma_max=g, parameter_reweight=pr))["m"]
        for g, pr in ((0, False), (1.0, True))
    )
    assert same(cut.factors.delta(), plain.factors.delta())
    assert max(cut.gamma) > 1.1  # it is reported as it was
    assert cut.gamma == pytest.approx(plain.gamma)


def test_homogeneous_of_degree_two() -> None:
    many = adapters((3, 4, 5))
    scaled = [{"m": Factors(3 * a["m"].a, 3 * a["m"].b)} for a in many]
    assert same(merged(scaled), 9 * merged(many))


def test_one_adapter() -> None:
    one = [{"m": factors(5, 1, scaling=0.5)}]
    assert same(merged(one), one[0]["m"].delta())
    pruned = merged(one, rank=2)
    assert torch.linalg.matrix_rank(pruned) <= 2


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_rank_is_kept(rank: int) -> None:
    result = lego(adapters(), Lego(rank=rank))["m"].factors
    assert result.a.shape == (rank, IN)
    assert result.b.shape == (OUT, rank)
    assert torch.linalg.matrix_rank(result.delta()) <= rank


def test_equal_scalings_may_stay_outside() -> None:
    inside, outside = merged(adapters(scaling=4.0), rank=3), merged(adapters(), rank=3)
    assert same(inside, 4 * outside)


def test_alphas_ranks_and_rslora_are_folded() -> None:
    settings = [(16, 4, False), (8, 2, True), (32, 8, False)]
    mixed = [
        {"m": factors(r, i, scaling_of(alpha, r, rs))} for i, (alpha, r, rs) in enumerate(settings)
    ]
    rewritten = [{"m": a["m"].folded()} for a in mixed]
    assert all(same(m["m"].delta(), r["m"].delta()) for m, r in zip(mixed, rewritten, strict=True))
    assert same(merged(mixed, rank=5), merged(rewritten, rank=5))
    assert scaling_of(8, 2, True) == pytest.approx(8 / math.sqrt(2))


def test_negative_scaling_is_kept() -> None:
    one = factors(4, 1, scaling=-2.0)
    assert same(merged([{"m": one}]), one.delta())


def test_zero_adapters_merge_to_zero() -> None:
    many = [{"m": Factors(a["m"].a, torch.zeros_like(a["m"].b))} for a in adapters()]
    assert not merged(many).any()
    assert not merged([{"m": Factors(0 * a["m"].a, 0 * a["m"].b)} for a in adapters()]).any()


def test_same_seed_same_bits() -> None:
    one, two = (lego(adapters((5, 6, 7)), Lego(rank=4, seed=3))["m"].factors for _ in range(2))
    assert torch.equal(one.a, two.a)
    assert torch.equal(one.b, two.b)


def test_modules_are_merged_apart() -> None:
    """What else is in the batch, or in the adapter, changes nothing."""
    both = [{"m": factors(4, i), "n": factors(4, 50 + i)} for i in range(3)]
    alone = [{"n": a["n"]} for a in both]
    one, two = lego(both, Lego(rank=3))["n"], lego(alone, Lego(rank=3))["n"]
    assert torch.equal(one.factors.a, two.factors.a)
    assert one.labels == two.labels


def test_a_module_that_some_lack_is_merged_over_the_others() -> None:
    many = adapters((4, 4, 4))
    many[1]["extra"] = factors(3, 77)
    result = lego(many)
    assert result["extra"].adapters == (1,)
    assert same(result["extra"].factors.delta(), many[1]["extra"].delta())
    assert result["m"].adapters == (0, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast_once(dtype: torch.dtype) -> None:
    half = [{"m": a["m"].to(dtype)} for a in adapters()]
    exact = lego([{"m": a["m"].to(torch.float32)} for a in half], Lego(rank=6))["m"].factors
    result = lego(half, Lego(rank=6))["m"].factors
    assert result.a.dtype == dtype
    assert torch.equal(result.a, exact.a.to(dtype))
    assert torch.equal(result.b, exact.b.to(dtype))


def test_more_clusters_than_units() -> None:
    many = adapters((2, 2))
    with pytest.raises(ConfigError, match="rank = 5 must be 4 or below for m"):
        lego(many, Lego(rank=5))
    padded = lego(many, Lego(rank=5, allow_pad=True, output_reweight=False))["m"].factors
    assert padded.rank == 5
    assert same(padded.delta(), total(many))


def test_energy_decides_the_rank() -> None:
    many = separated(copies=4, rank=3, noise=1e-4)
    assert lego(many, Lego(rank="energy:0.99"))["m"].factors.rank == 3
    assert lego(many, Lego(rank="energy:0"))["m"].factors.rank == 1
    assert lego(adapters(), Lego(rank="energy:1"))["m"].factors.rank == 12


def test_unit_weights() -> None:
    """A rank-4 adapter and a rank-1 one, in one cluster."""
    big, small = factors(4, 0), factors(1, 1)
    one = Factors(big.a[:1].repeat(4, 1), big.b[:, :1].repeat(1, 4))
    many, means = [{"m": one}, {"m": small}], {}
    for kind in ("uniform", "client", "client_per_rank"):
        options = Lego(rank=1, unit_weight=kind, parameter_reweight=False, output_reweight=False)
        row = lego(many, options, [1.0, 3.0])["m"].factors.a[0]
        gap = big.a[0] - small.a[0]
        means[kind] = float((row - small.a[0]) @ gap / (gap @ gap))
    assert means["uniform"] == pytest.approx(4 / 5)
    assert means["client"] == pytest.approx(4 / (4 + 3))
    assert means["client_per_rank"] == pytest.approx(1 / (1 + 3))


# ------------------------------------------------------------------------ what it does not keep


def _flipped(f: Factors) -> Factors:
    return Factors(-f.a, -f.b)


def _rescaled(f: Factors) -> Factors:
    return Factors(4 * f.a, f.b / 4)


def _rotated(f: Factors) -> Factors:
    q = torch.linalg.qr(torch.randn(4, 4, generator=draw(5), dtype=torch.float64))[0]
    return Factors(q @ f.a, f.b @ q.T)


@pytest.mark.parametrize("gauge", [_flipped, _rescaled, _rotated])
def test_other_factorisations_merge_differently(gauge) -> None:
    one = factors(4, 3)
    other = gauge(one)
    assert same(other.delta(), one.delta())
    assert relative(merged([{"m": one}, {"m": other}]), one.delta()) > 0.2


def test_sign_alignment_removes_signs() -> None:
    one = factors(4, 3)
    assert same(merged([{"m": one}, {"m": _flipped(one)}], sign_align=True), one.delta())
    many = adapters((3, 4, 5))
    turned = [many[0], {"m": _flipped(many[1]["m"])}, many[2]]
    assert same(merged(turned, sign_align=True), merged(many, sign_align=True))


def test_balancing_removes_scales() -> None:
    one = factors(4, 3)
    assert same(merged([{"m": one}, {"m": _rescaled(one)}], balance=True), one.delta())
    many = adapters((3, 4, 5))
    turned = [many[0], {"m": _rescaled(many[1]["m"])}, many[2]]
    assert same(merged(turned, balance=True), merged(many, balance=True))


def test_shared_start_makes_it_a_blown_up_fedit() -> None:
    base = factors(4, 0)
    many = []
    for i in range(6):
        drift = factors(4, 10 + i)
        many.append({"m": Factors(base.a + 0.1 * drift.a, base.b + 0.1 * drift.b)})
    plain = lego(many, PLAIN)["m"]
    assert plain.by_rank_index
    assert same(plain.factors.delta(), fedit(many)["m"].delta())
    exact = total(many) / 6
    assert relative(merged(many), exact) > relative(fedit(many)["m"].delta(), exact)
    assert float(merged(many).norm()) > float(plain.factors.delta().norm())
    assert not lego(adapters(), PLAIN)["m"].by_rank_index
    assert not lego(separated(), PLAIN)["m"].by_rank_index


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0}, {"rank": "most"}, {"rank": "energy:2"}, {"rank": "energy:x"},
        {"feature": "cosine"}, {"unit_weight": "big"}, {"norm": "l1"},
        {"order": "none"}, {"gamma_max": 0.5},
        {"n_init": 0}, {"max_iter": 0}, {"reference_rank": -1},
    ],
)  # fmt: skip
def test_wrong_options(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} = "):
        Lego(**wrong)


def test_adapters_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="one adapter or more"):
        lego([])
    bad = Factors(torch.zeros(2, IN + 1), torch.zeros(OUT, 2))
    with pytest.raises(ConfigError, match=r"m: shapes \[out, in\]"):
        lego([*adapters(), {"m": bad}])
    with pytest.raises(ConfigError, match="are no factors"):
        lego([{"m": Factors(torch.zeros(IN, 2), torch.zeros(2, OUT))}])
    with pytest.raises(ConfigError, match="weights"):
        lego(adapters(), weights=[1, 2])
