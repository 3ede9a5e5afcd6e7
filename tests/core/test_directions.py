"""Seeded directions: known answers, values by hand, algebra, moments, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, truncnorm

from fedsim.core import directions
from fedsim.core.directions import BASES, arrays, combine, dots, perturb, pool, sample
from fedsim.core.errors import ConfigError

TOP = 2**64 - 1
SIGNS = ("rademacher", "rademacher32")
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def vector(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(size)).to(dtype)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# ------------------------------------------------------------------------ the layout


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter: tuple, key: tuple, answer: str) -> None:
    expected = [int(word, 16) for word in answer.split()]
    assert list(arrays.philox(counter, key)) == expected
    for array in (np.array, torch.tensor):
        words = arrays.philox(tuple(array([c]) for c in counter), key)
        assert [int(word[0]) for word in words] == expected


def by_hand(basis: str, seed: int, i: int, block: int, size: int) -> float:
    """Element i of a direction, by the page `layout` and Python's own arithmetic."""
    per = 128 if basis == "rademacher" else 4
    key = seed >> 5 if basis == "rademacher32" else seed
    tag = {"gaussian": 1, "uniform": 2, "truncated": 2, "rademacher": 3, "rademacher32": 4}[basis]
    c = i // per
    x = arrays.philox((c & 0xFFFFFFFF, c >> 32, block, tag), (key & 0xFFFFFFFF, key >> 32))
    if basis == "rademacher":
        return 1 - 2 * (x[i // 32 % 4] >> i % 32 & 1)
    if basis == "rademacher32":
        return 1 - 2 * (x[i % 4] >> seed % 32 & 1)
    if basis == "gaussian":
        u, v = ((word + 1) * 2.0**-32 for word in x[i % 4 // 2 * 2 :][:2])
        wave = math.sin if i % 2 else math.cos
        return math.sqrt(-2 * math.log(u)) * wave(2 * math.pi * v)
    a = 1 / math.sqrt(size)
    s = (2 * (x[i % 4] // 256 - 2**23) + 1) * 2.0**-24
    return a * s if basis == "uniform" else float(truncnorm(-a, a).ppf((1 + s) / 2))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("seed", [0, 37, 2**63, TOP])
@pytest.mark.parametrize(("offset", "block"), [(0, 0), (3, 1), (2**34 + 3, 1)])
def test_values_are_those_of_the_layout(basis: str, seed: int, offset: int, block: int) -> None:
    blocks = [offset, 150] if block else None
    z = sample(seed, 150, basis=basis, offset=offset, blocks=blocks)
    expected = [by_hand(basis, seed, offset + i, block, 150) for i in range(150)]
    exact = basis in SIGNS
    np.testing.assert_allclose(z.numpy(), expected, rtol=0, atol=0 if exact else 1e-6)


def test_box_muller_is_exact_to_five_units_in_the_last_place() -> None:
    rng, edge = np.random.default_rng(1), np.arange(3000)
    x = [rng.integers(0, 2**32, 200_000), edge, 2**32 - 1 - edge, int(2**31.5) - 1500 + edge]
    y = [rng.integers(0, 2**32, 206_000), (edge // 333 << 29) + edge % 333 - 166]
    x, y = np.concatenate(x), np.concatenate(y) % 2**32
    a, b = arrays.box_muller(np, x, y)
    r = np.sqrt(-2 * np.log1p(-(2.0**32 - 1 - x) * 2.0**-32))
    turns = (y + 1) * 2.0**-32
    quarter = np.rint(4 * turns)
    rest = (turns - quarter / 4) * 2 * np.pi
    c, s, q = np.cos(rest), np.sin(rest), quarter.astype(int) % 4
    for got, exact in (
        (a, r * np.choose(q, [c, -s, -c, s])),
        (b, r * np.choose(q, [s, c, -s, -c])),
    ):
        error = np.abs(got - exact)
        assert error.max() < 1e-6
        assert (error / np.spacing(np.abs(exact).astype(np.float32).clip(1e-30))).max() < 5


def test_pool_is_distinct_in_groups_of_32_and_a_prefix_of_a_longer_one() -> None:
    seeds = pool(42, 4096)
    assert seeds.dtype == np.uint64
    assert len(set(seeds.tolist())) == 4096
    assert np.array_equal(pool(42, 70), seeds[:70])
    assert np.array_equal(seeds % 32, np.arange(4096) % 32)
    assert len(np.unique(seeds // 32)) == 128
    x = arrays.philox((2, 0, 0, 5), (42, 0))
    assert int(seeds[64]) // 32 == (x[0] | x[1] << 32) >> 5
    assert not set(pool(43, 64).tolist()) & set(seeds.tolist())
    assert len(pool(0, 0)) == 0


# ------------------------------------------------------------------------ algebra


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_combine_and_dots_are_adjoint(basis: str, dtype: torch.dtype, close: float) -> None:
    """F1: <combine(c), x> = <c, dots(x)>, by blocks and with counts."""
    blocks, counts, seeds = [1000, 1, 0, 5003], [20, 7, 3, 0], pool(5, 24)[4:]
    x, c = vector(6004, dtype), numbers(4, 20)
    c *= np.arange(20) < np.array(counts)[:, None]
    w = torch.zeros(6004, dtype=dtype)
    combine(w, seeds, c, basis=basis, blocks=blocks)
    gamma = dots(x, seeds, basis=basis, blocks=blocks, counts=counts)
    assert gamma.shape == (4, 20)
    assert not gamma[np.arange(20) >= np.array(counts)[:, None]].any()
    left, right = float(w.double() @ x.double()), float((gamma * torch.from_numpy(c)).sum())
    size = float(w.double().norm() * x.double().norm())
    assert left == pytest.approx(right, abs=close * size)


@pytest.mark.parametrize("basis", BASES)
@settings(max_examples=15)
@given(data=st.data())
def test_combination_is_the_sum_of_single_walks(basis: str, data: st.DataObject) -> None:
    """K3: linear, any order of seeds, repeated seeds add up, zero coefficients change nothing."""
    size = data.draw(st.sampled_from([0, 1, 3, 4, 5, 130, 4095, 4096, 4097]))
    offset = data.draw(st.integers(0, 2**40))
    seeds = data.draw(st.lists(st.integers(0, TOP), max_size=6))
    seeds += data.draw(st.lists(st.sampled_from(seeds or [0]), max_size=2))
    c = data.draw(st.lists(st.floats(-2, 2), min_size=len(seeds), max_size=len(seeds)))
    options = {"basis": basis, "offset": offset}
    w = vector(size, torch.float64)
    one_by_one, turned, skipped = w.clone(), w.clone(), w.clone()
    for seed, x in zip(seeds, c, strict=True):
        perturb(one_by_one, seed, x, **options)
    combine(w, seeds, c, **options)
    combine(turned, seeds[::-1], c[::-1], **options)
    combine(skipped, [*seeds, 99], [*c, 0.0], **options)
    assert torch.allclose(w, one_by_one, rtol=0, atol=1e-12)
    assert torch.allclose(w, turned, rtol=0, atol=1e-12)
    assert torch.equal(w, skipped)


def test_all_zero_coefficients_leave_every_bit() -> None:
    w = torch.tensor([-0.0, 1.0, float("nan"), float("inf")])
    bits = w.view(torch.int32).clone()
    combine(w, [1, 2], [0.0, 0.0])
    combine(w, [], [])
    assert torch.equal(w.view(torch.int32), bits)


@pytest.mark.parametrize("basis", BASES)
def test_values_do_not_depend_on_how_the_vector_is_cut(basis: str) -> None:
    whole, seeds, c = vector(9001), [3, 4, 2**40], numbers(3)
    sizes, parts, rest = [1, 2, 0, 125, 2047, 4097, 2729], {}, whole.clone()
    for name, size in zip("abcdefg", sizes, strict=True):
        parts[name], rest = rest[:size].clone(), rest[size:]
    expected = dots(whole, seeds, basis=basis)
    combine(whole, seeds, c, basis=basis)
    for cut in (parts, list(parts.values())):
        copy = (
            {n: x.clone() for n, x in parts.items()} if cut is parts else [*map(torch.clone, cut)]
        )
        got = dots(copy, seeds, basis=basis)
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
        combine(copy, seeds, c, basis=basis)
        assert torch.equal(torch.cat(list(copy.values()) if cut is parts else copy), whole)
    # One tensor at a time, as a streamed model would be.
    before = 0
    for x in parts.values():
        combine(x, seeds, [c], basis=basis, offset=before, blocks=[9001])
        before += x.numel()
    assert torch.equal(torch.cat(list(parts.values())), whole)


def test_blocks_are_streams_of_their_own() -> None:
    z = sample(7, 2000, blocks=[1000, 1000])
    assert torch.equal(z[:1000], sample(7, 1000))
    assert torch.equal(z[1000:], sample(7, 1000, offset=1000, blocks=[1000, 1000]))
    assert not torch.equal(z[1000:], sample(7, 2000)[1000:])


def test_shapes_dtypes_and_strides_of_models() -> None:
    """Parameters of several dtypes and shapes; leaves stay leaves; autograd sees the change."""
    layer = torch.nn.Linear(30, 7)
    state = dict(layer.named_parameters()) | {"half": torch.zeros(3, 5, dtype=torch.float16)}
    z = sample(5, 232)
    before = layer.weight._version
    flat = torch.cat([p.detach().reshape(-1) for p in layer.parameters()])
    combine(state, [5], [1.0])
    assert layer.weight._version > before
    assert layer.weight.is_leaf
    assert torch.equal(
        torch.cat([p.detach().reshape(-1) for p in layer.parameters()]), flat + z[:217]
    )
    assert torch.equal(state["half"].reshape(-1), z[217:].half())
    with torch.inference_mode():
        x = torch.zeros(4)
        combine(x, [5], torch.ones(1, dtype=torch.bfloat16))
    assert torch.equal(x, z[:4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    w, seeds, c = vector(70_001, dtype), list(range(50)), 1e-3 * numbers(50)
    wide = w.float()
    combine(wide, seeds, c)
    delta = w.clone()
    combine(w, seeds, c)
    assert w.dtype == dtype
    assert torch.equal(w, wide.to(dtype))
    assert torch.equal(dots(delta, seeds), dots(delta.float(), seeds))


def test_projection_of_tiny_half_precision_updates_is_not_lost() -> None:
    """F15: products far below float16's smallest number still count."""
    delta = (1e-5 * vector(1 << 18)).half()
    got = dots(delta, range(8), basis="uniform")
    exact = dots(delta.double(), range(8), basis="uniform")
    assert (got - exact).abs().max() < 1e-2 * exact.std()
    assert got.abs().min() > 0


def test_wide_weights_get_the_same_directions() -> None:
    w = torch.zeros(5000, dtype=torch.float64)
    perturb(w, 11, 1.0)
    assert torch.equal(w, sample(11, 5000).double())


def test_restoring_a_perturbation() -> None:
    """K9: three walks of a zeroth-order step come back within float32 rounding."""
    w = vector(10_000)
    start = w.clone()
    for scale in (5e-4, -1e-3, 5e-4):
        perturb(w, 123, scale)
    assert (w - start).norm() / start.norm() < 1e-6


# ------------------------------------------------------------------------ distributions


@pytest.mark.parametrize("basis", BASES)
def test_moments(basis: str) -> None:
    """K6 and F6: mean, variance, fourth moment; neighbours and seeds are uncorrelated (K5)."""
    d = 200_000
    z, other = (sample(s, d, basis=basis).double() for s in (64, 65))
    sd = math.sqrt(directions.variance(basis, d))
    z, other = z / sd, other / sd
    kurtosis = {"gaussian": 3.0, "uniform": 1.8, "truncated": 1.8}.get(basis, 1.0)
    assert abs(z.mean()) < 5 / math.sqrt(d)
    assert abs(z.square().mean() - 1) <= 5 * math.sqrt((kurtosis - 1) / d) + 1e-6
    assert z.pow(4).mean() == pytest.approx(kurtosis, rel=0.05)
    assert abs((z * other).mean()) < 5 / math.sqrt(d)
    for lag in (1, 2, 4, 128, 2048):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(d - lag)


@pytest.mark.parametrize(
    ("basis", "cdf"), [("gaussian", "norm"), ("uniform", "uniform"), ("truncated", "uniform")]
)
def test_shape_of_the_distribution(basis: str, cdf: str) -> None:
    """F5: Ferret's bases lie in [-1/sqrt(d), 1/sqrt(d)] and look uniform."""
    d = 20_000
    z = sample(2, d, basis=basis).double().numpy()
    if cdf == "uniform":
        assert np.abs(z).max() <= 1 / math.sqrt(d)
        assert np.linalg.norm(z) == pytest.approx(math.sqrt(1 / 3), rel=0.02)
        z = (z * math.sqrt(d) + 1) / 2
    assert kstest(z, cdf).pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 2, 10, 1000])
def test_small_truncated_blocks_follow_the_truncated_normal(size: int) -> None:
    a, count = 1 / math.sqrt(size), 20_000 // size
    z = sample(9, count * size, basis="truncated", blocks=[size] * count).numpy()
    assert np.abs(z).max() <= np.float32(a)
    assert kstest(z, truncnorm(-a, a).cdf).pvalue > 1e-3


def test_variances() -> None:
    """F6: Ferret's rho from its formula, its series and in between."""
    for d, expected in ((10, 0.98673058), (100, 0.99866730), (10_000, 0.99998667)):
        assert 3 * d * directions.variance("truncated", d) == pytest.approx(expected, abs=1e-8)
    below, above = (directions.variance("truncated", d) * d for d in (999, 1000))
    assert below == pytest.approx(above, rel=1e-6)
    assert directions.variance("uniform", 100) == pytest.approx(1 / 300)
    assert directions.variance("gaussian", 5) == directions.variance("rademacher32") == 1


@pytest.mark.parametrize("basis", ["gaussian", "uniform", "truncated", "rademacher"])
def test_reconstruction_is_unbiased_with_the_known_error(basis: str) -> None:
    """F2, F3: V V'x / (rho K) has mean x and relative error (d - 2 + kurtosis) / K."""
    d, k = 500, 2000
    x = vector(d, torch.float64)
    w, seeds = torch.zeros_like(x), range(k)
    rho = directions.variance(basis, d)
    combine(w, seeds, dots(x, seeds, basis=basis) / (rho * k), basis=basis)
    kurtosis = {"gaussian": 3.0, "rademacher": 1.0}.get(basis, 1.8)
    assert float(w @ x / (x @ x)) == pytest.approx(1, abs=5 * math.sqrt(2 / k))
    assert float((w - x).square().sum() / (x @ x)) == pytest.approx(
        (d - 2 + kurtosis) / k, rel=0.15
    )


# ------------------------------------------------------------------------ counting and refusing


def test_draws_are_counted() -> None:
    """F12: cutting the vector in L blocks and the directions by L divides the draws by L."""
    w, seeds = torch.zeros(4096), range(64)
    with directions.count_draws() as whole:
        dots(w, seeds)
    with directions.count_draws() as cut:
        dots(w, seeds, blocks=[1024] * 4, counts=[16] * 4)
        with directions.count_draws() as inner:
            perturb(w, 1, 1.0)
    assert (whole.total, cut.total, inner.total) == (64 * 4096, 16 * 4096, 4096)


X = torch.zeros(10)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: combine(X.long(), [1], [1.0]), "int64"),
        (lambda: combine([1.0], [1], [1.0]), "float;"),
        (lambda: combine(np.zeros(3), [1], [1.0]), "got float64"),
        (lambda: combine(torch.zeros(4, 4).t(), [1], [1.0]), "contiguous"),
        (lambda: combine(torch.zeros(4).to_sparse(), [1], [1.0]), "contiguous"),
        (lambda: combine(torch.zeros(4, device="meta"), [1], [1.0]), "meta"),
        (lambda: combine([X, torch.zeros(4, device="meta")], [1], [1.0]), "meta"),
        (lambda: combine([X, X], [1], [1.0]), "twice"),
        (lambda: combine(X, [1, 2], [1.0]), "shape"),
        (lambda: combine(X, [1], [1.0], blocks=[10]), "shape"),
        (lambda: combine(X, [-1], [1.0]), "2^64"),
        (lambda: combine(X, [2**64], [1.0]), "2^64"),
        (lambda: combine(X, [0.5], [1.0]), "integers"),
        (lambda: combine(X, [[1]], [[1.0]]), "flat"),
        (lambda: combine(X, [1], [float("nan")]), "finite"),
        (lambda: combine(X, [1], ["much"]), "finite"),
        (lambda: combine(X, [1], [1.0], basis="normal"), "gaussian"),
        (lambda: combine(X, [1], [1.0], backend="triton"), "on cpu"),
        (lambda: combine(X, [1], [1.0], backend="fast"), "numba"),
        (lambda: combine(X, [1], [[1.0]], blocks=[9]), "cover"),
        (lambda: combine(X, [1], [1.0], offset=-1), "offset"),
        (lambda: dots(X, [1], blocks=[5, 5], counts=[1]), "counts"),
        (lambda: dots(X, [1], counts=[2]), "counts"),
        (lambda: pool(-1, 3), "2^64"),
    ],
)
def test_mistakes_are_named(call, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("^", r"\^")):
        call()
    assert not X.any()
