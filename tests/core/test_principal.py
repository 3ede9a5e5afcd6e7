"""Principal-gradient aggregation against a naive oracle, golden numbers, and its guarantees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedsim.core import principal
from fedsim.core.principal import principal_aggregate

Matrix = NDArray[np.float64]


def official(G: Matrix, rho: float = 0.8) -> Matrix:
    """The authors' `pcgrad_svd` for one tensor after its first round, loop by loop."""
    N = len(G)
    E, lam, _ = np.linalg.svd(G @ G.T / N)
    revised = np.zeros_like(G)
    for j in range(int(rho * N)):
        w = G.T @ E[:, j]  # "construct principal gradients"
        if (G @ w >= 0).sum() < (G @ w < 0).sum():  # "calibrate"
            w = -w
        for m in range(N):  # "revise local gradients"
            q = (G[m] @ w) / (w @ w) * w
            revised[m] += lam[j] / lam.sum() * np.linalg.norm(G[m]) * q / np.linalg.norm(q)
    return revised.mean(0)


def aggregate(G: Matrix, **options: object) -> Matrix:
    return principal_aggregate(torch.from_numpy(G), **options).numpy()  # type: ignore[arg-type]


def gapped(seed: int, N: int, d: int) -> Matrix:
    """Random updates whose singular values halve from one to the next."""
    draw = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draw.normal(size=(n, n)))[0] for n in (N, d))
    rank = min(N, d)
    return left[:, :rank] * 2.0 ** -np.arange(rank) @ right[:rank]


problems = st.builds(gapped, st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 20))
F1 = np.array([[3, 1, 0], [2, -1, 1], [1, 2, -1], [2, 0, 2], [4, 1, 1]], dtype=np.float64)
F2 = np.array([[-1, 0], [1, -3], [-1, 0], [0, 2]], dtype=np.float64)


def test_golden_f1() -> None:
    lam = np.linalg.eigvalsh(F1 @ F1.T / 5)[::-1]
    assert lam == pytest.approx([7.5906709769, 1.7930212071, 0.2163078160, 0, 0], abs=1e-10)
    for rho, golden in (
        (0.4, [2.2651284701, 0.5998235744, 0.5149062787]),  # the first 2 directions
        (0.2, [2.2609221045, 0.4707897285, 0.6269665940]),  # the first
    ):
        assert official(F1, rho) == pytest.approx(golden, abs=1e-10)
        assert aggregate(F1, rho=rho) == pytest.approx(golden, abs=1e-10)
    # rho = 0.8 keeps 4, of which the fourth has no energy and counts for nothing.
    golden = [2.2593735031, 0.6108462396, 0.5273825009]
    assert aggregate(F1) == pytest.approx(golden, abs=1e-10)
    assert aggregate(F1, r_max=3) == pytest.approx(golden, abs=1e-10)
    assert F1.mean(0) == pytest.approx([2.4, 0.6, 0.6])


def test_golden_f2_points_away_from_the_mean() -> None:
    golden = np.array([0.0549597345, 0.2030783323])
    assert aggregate(F2) == pytest.approx(golden, abs=1e-10)
    mean = F2.mean(0)
    assert mean == pytest.approx([-0.25, -0.25])
    cosine = golden @ mean / np.linalg.norm(golden) / np.linalg.norm(mean)
    assert cosine == pytest.approx(-0.867, abs=5e-4)


@given(st.builds(gapped, st.integers(0, 10**6), st.integers(2, 9), st.integers(9, 20)))
def test_the_closed_form_is_the_naive_triple_loop(G: Matrix) -> None:
    assert aggregate(G) == pytest.approx(official(G), abs=1e-10 * np.abs(G).max())


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    G = gapped(1, 5, 40)
    whole = aggregate(G)
    monkeypatch.setattr(principal, "BLOCK", 35)
    assert aggregate(G) == pytest.approx(whole, rel=1e-12)


def test_identical_updates_give_that_update() -> None:
    g = torch.arange(1, 8, dtype=torch.float32) / 3
    torch.testing.assert_close(principal_aggregate(g.repeat(6, 1)), g, rtol=1e-6, atol=0)


@given(st.lists(st.floats(-10, 10).filter(lambda c: abs(c) > 1e-3), min_size=1, max_size=8))
def test_collinear_updates_give_their_mean(c: list[float]) -> None:
    g = np.array([1.0, -2.0, 0.5])
    assert aggregate(np.outer(c, g)) == pytest.approx(np.mean(c) * g, abs=1e-9)


def test_degenerate_updates_are_finite() -> None:
    G = gapped(2, 5, 4)
    frozen = G.copy()
    frozen[2] = 0
    with np.errstate(invalid="ignore"):
        assert np.isnan(official(frozen, 0.6)).any()  # what the authors' code makes of it
    assert np.isfinite(aggregate(frozen)).all()
    assert aggregate(np.zeros((4, 3))).tolist() == [0, 0, 0]
    assert aggregate(G[:1]) == pytest.approx(G[0])  # one client
    assert aggregate(G[:, :1]) == pytest.approx(G[:, :1].mean(0))  # one number
    assert aggregate(np.empty((3, 0))).shape == (0,)
    # Orthogonal updates: every direction is one of them, and the others count 0 there.
    assert aggregate(np.diag([3.0, 2.0, 1.0]), rho=1.0) == pytest.approx(
        [9 / 14 * 3 / 3, 4 / 14 * 2 / 3, 1 / 14 * 1 / 3]
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e20, 1e37])
def test_float32_updates_neither_vanish_nor_overflow(scale: float) -> None:
    G = torch.from_numpy(F1).float()
    found = principal_aggregate(G * scale) / scale
    torch.testing.assert_close(found, principal_aggregate(G), rtol=1e-5, atol=0)


def test_float16_updates_are_summed_in_more_than_float16() -> None:
    G = torch.from_numpy(F1) * 1e4
    found = principal_aggregate(G.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), principal_aggregate(G), rtol=2e-3, atol=10)


@given(problems, st.sampled_from([0.3, 0.8, 1.0]))
def test_guarantees(G: Matrix, rho: float) -> None:
    """Section 1.4 of the specification, 1 to 4."""
    N = len(G)
    lam, E = np.linalg.eigh(G @ G.T / N)
    lam, E = lam[::-1].clip(0), E[:, ::-1]
    k = min(max(1, int(rho * N)), int((lam > 1e-12 * lam[0]).sum()))
    share, norms = lam / lam.sum(), np.linalg.norm(G, axis=1)
    u = (G.T @ E[:, :k]) / np.sqrt(N * lam[:k])
    revised = norms[:, None] * (share[:k] * np.sign(G @ u) @ u.T)
    tiny = 1e-9 * norms.max()

    found = aggregate(G, rho=rho)
    assert found == pytest.approx(revised.mean(0), abs=tiny)
    assert ((revised * G).sum(1) >= -tiny).all()
    assert np.linalg.norm(revised, axis=1) == pytest.approx(
        norms * np.linalg.norm(share[:k]), abs=tiny
    )
    assert np.linalg.norm(found) <= norms.mean() * np.linalg.norm(share[:k]) + tiny
    inside = G.T @ np.linalg.lstsq(G.T, found, rcond=None)[0]
    assert inside == pytest.approx(found, abs=tiny)
    for r in range(1, k):
        gap = np.linalg.norm(found - aggregate(G, rho=rho, r_max=r))
        assert gap <= norms.mean() * np.linalg.norm(share[r:k]) + tiny
        assert gap <= norms.mean() * np.sqrt(share[r]) + tiny


@given(problems, st.randoms(use_true_random=False))
def test_symmetries(G: Matrix, random: object) -> None:
    expected, scale = aggregate(G), np.abs(G).max()
    order = np.random.default_rng(random.getrandbits(32)).permutation(len(G))  # type: ignore[attr-defined]
    turn = np.linalg.qr(gapped(3, G.shape[1], G.shape[1]))[0]
    assert aggregate(G[order]) == pytest.approx(expected, abs=1e-10 * scale)
    assert aggregate(7 * G) == pytest.approx(7 * expected, abs=1e-9 * scale)
    assert aggregate(-G) == pytest.approx(-expected, abs=1e-10 * scale)
    assert aggregate(G @ turn) == pytest.approx(expected @ turn, abs=1e-9 * scale)


def test_duplicating_the_cohort_changes_nothing_if_all_directions_are_kept() -> None:
    assert aggregate(np.vstack([F2, F2]), rho=1.0) == pytest.approx(aggregate(F2, rho=1.0))


def test_the_sign_of_a_direction_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the majority vote of the authors' code can be left out."""
    expected, eigh = aggregate(F1), torch.linalg.eigh
    for flips in ([1, 1, 1, 1, -1], [-1, -1, -1, -1, -1], [1, -1, 1, -1, 1]):
        signs = torch.tensor(flips, dtype=torch.float64)

        def flipped(K: torch.Tensor, signs: torch.Tensor = signs) -> tuple[torch.Tensor, ...]:
            lam, E = eigh(K)
            return lam, E * signs

        monkeypatch.setattr(torch.linalg, "eigh", flipped)
        assert (aggregate(F1) == expected).all()


@pytest.mark.parametrize(
    ("renorm", "length"),
    [
        ("mean", np.linalg.norm(F1.mean(0))),
        ("mean_norm", np.linalg.norm(F1, axis=1).mean()),
    ],
)
def test_renorm_sets_the_length_only(renorm: str, length: float) -> None:
    plain, found = aggregate(F1), aggregate(F1, renorm=renorm)
    assert np.linalg.norm(found) == pytest.approx(length)
    assert found / np.linalg.norm(found) == pytest.approx(plain / np.linalg.norm(plain))
