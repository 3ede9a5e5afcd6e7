"""Importance, selection and schedule of structured pruning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core.structure import (
    Structure,
    group_scores,
    lowered,
    packed,
    ramp,
    removed,
    sensitivity,
    unpacked,
)  # fmt: skip


def structure(name: str = "s", groups: int = 6, size: int = 2) -> Structure:
    index = torch.arange(groups * size).view(groups, size)
    return Structure(name, 0, {"in": index[None]}, ("out", index))


def test_the_estimate_is_minus_the_change_of_one_step() -> None:
    """(B - g_B)(A - g_A) - B A = -(g_B A + B g_A - g_B g_A); W = 1, s = 0 shows its size."""
    draw = torch.Generator().manual_seed(0)
    a, grad_a = torch.randn(2, 3, 5, generator=draw, dtype=torch.float64)
    b, grad_b = torch.randn(2, 4, 3, generator=draw, dtype=torch.float64)
    change = (b - grad_b) @ (a - grad_a) - b @ a
    found = sensitivity(torch.ones(4, 5, dtype=torch.float64), a, b, grad_a, grad_b, 0.0)
    assert torch.allclose(found, change.abs(), atol=1e-12)


def test_sensitivity_by_hand() -> None:
    """Rank 1: W = 2, A = 3, B = 5, g_A = 0.5, g_B = 0.1, s = 2.

    G = 0.1 * 3 + 5 * 0.5 - 0.1 * 0.5 = 2.75; W + s B A = 32; |G * 32| = 88.
    """
    found = sensitivity(*(torch.tensor([[v]]) for v in (2.0, 3.0, 5.0, 0.5, 0.1)), 2.0)
    assert found.item() == pytest.approx(88.0)


def test_a_group_without_weights_scores_zero_and_goes_first() -> None:
    s = structure()
    draw = torch.Generator().manual_seed(0)
    elements = {"in": torch.rand(12, 4, generator=draw), "out": torch.rand(3, 12, generator=draw)}
    elements["in"][4:6] = 0
    elements["out"][:, 4:6] = 0
    scores = group_scores(s, elements)
    assert scores[2] == 0
    kept = lowered({"s": torch.ones(6, dtype=torch.bool)}, {"s": scores}, 1 / 6, [s])
    assert (~kept["s"]).nonzero().tolist() == [[2]]


def test_every_layer_counts_alike() -> None:
    """Sums are scaled to norm 1 in each layer, so a layer of large numbers does not outvote."""
    s = structure(groups=2, size=1)
    elements = {"in": torch.tensor([[3.0], [4.0]]), "out": torch.tensor([[4e6, 3e6]])}
    assert group_scores(s, elements).tolist() == pytest.approx([1.4, 1.4])


@given(st.lists(st.floats(0, 0.99), min_size=2, max_size=6), st.integers(1, 9))
def test_masks_only_shrink_and_meet_their_share(shares: list[float], groups: int) -> None:
    s, draw = structure(groups=groups), torch.Generator().manual_seed(groups)
    kept = {"s": torch.ones(groups, dtype=torch.bool)}
    most = 0.0
    for share in shares:
        after = lowered(kept, {"s": torch.rand(groups, generator=draw)}, share, [s])
        assert not (after["s"] & ~kept["s"]).any()
        most = max(most, share)
        assert int((~after["s"]).sum()) == removed(most, s)
        assert abs(removed(most, s) - most * groups) <= 1
        kept = after
    assert kept["s"].any()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 2**31))
def test_bits_there_and_back(groups: list[int], seed: int) -> None:
    items = [structure(f"s{i}", g) for i, g in enumerate(groups)]
    draw = torch.Generator().manual_seed(seed)
    kept = {s.name: torch.rand(s.groups, generator=draw) < 0.5 for s in items}
    for mask in kept.values():
        mask[-1] = True
    data = packed(kept, items)
    assert data.numel() == -(-sum(groups) // 8)
    assert all(torch.equal(m, kept[n]) for n, m in unpacked(data, items).items())


@pytest.mark.parametrize("data", [torch.zeros(n, dtype=torch.uint8) for n in (1, 2)])
def test_wrong_bits_are_refused(data: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"cannot say|no group left"):
        unpacked(data, [structure(groups=6)])


@pytest.mark.parametrize(
    ("step", "sparsity"),
    [(0, 0.1), (10, 0.1), (100, 0.5), (55, 0.5 - 0.4 / 8)],
)
def test_the_cubic_ramp(step: int, sparsity: float) -> None:
    """From 0.1 to 0.5 over 100 steps, a tenth of it warm-up; half way (1 - 1/2)^3 is left."""
    assert ramp(step, 100, 0.1, 0.5, warm=0.1) == pytest.approx(sparsity)
