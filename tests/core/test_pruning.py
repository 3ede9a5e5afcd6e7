"""Which groups go next: a share of every layer, or one ranking of the whole model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core.pruning import CHANNELS, Pruning, floor
from fedsim.core.structure import Structure, Structures


def structure(name: str, groups: int, size: int) -> Structure:
    index = torch.arange(groups * size).view(groups, size)
    return Structure(name, 0, {f"{name}.in": index[None]}, (f"{name}.out", index))


def model(scope: str = "global", *parts: tuple[int, int]) -> Pruning:
    """Structures with so many groups of so many channels, in a model that is 4 wide."""
    items = tuple(structure(f"s{i}", g, k) for i, (g, k) in enumerate(parts or ((2, 3), (20, 1))))
    shapes: dict[str, tuple[int, int]] = {}
    for s in items:
        width = s.columns[1].numel()
        shapes |= {f"{s.name}.in": (width, 4), f"{s.name}.out": (4, width)}
    weights = {path: path for path in shapes}
    total = sum(a * b for a, b in shapes.values())
    return Pruning(Structures(items, weights, shapes, {}, total), items, scope)


def whole(plan: Pruning) -> dict[str, Tensor]:
    return plan.structures.whole()


def test_the_ranking_by_hand() -> None:
    """Two heads of 24 weights, 20 channels of 8: 208 in all. Half of them, 104.

    Per weight the heads score 1 / 24 and 48 / 24, the channels 1 / 8, 2 / 8, ..., 20 / 8. So the
    first head goes (24 gone), then the ten worst channels: 104.
    """
    plan = model()
    scores = {"s0": torch.tensor([1.0, 48.0]), "s1": torch.arange(1.0, 21.0)}
    after = plan.lowered(whole(plan), scores, 0.5)
    assert after["s0"].tolist() == [False, True]
    assert after["s1"].tolist() == [False] * 10 + [True] * 10
    assert plan.gone(after) == 0.5
    assert plan.gone(whole(plan)) == 0
    assert not plan.due(after, 0.5)
    assert plan.due(after, 0.6)


def test_a_layer_may_lose_more_than_another_but_never_everything() -> None:
    plan = model("global", (4, 2), (30, 1))
    scores = {"s0": torch.full((4,), 9.0), "s1": torch.rand(30, generator=torch.Generator())}
    after = plan.lowered(whole(plan), scores, 0.9)
    assert int(after["s1"].sum()) == CHANNELS
    assert int(after["s0"].sum()) == 1
    assert floor(structure("few", 6, 1)) == 3
    by_layer = model("layer", (4, 2), (30, 1))
    after = by_layer.lowered(whole(by_layer), scores, 0.5)
    assert [int(m.sum()) for m in after.values()] == [2, 15]


shares = st.lists(st.floats(0, 0.99), min_size=1, max_size=5)


@example(wanted=[0.71875, 0.0], parts=[(5, 1), (5, 1), (6, 1)])
@given(shares, st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=4))
def test_masks_only_shrink_and_come_within_a_group_of_their_share(
    wanted: list[float], parts: list[tuple[int, int]]
) -> None:
    for scope in ("layer", "global"):
        plan = model(scope, *parts)
        kept, draw = whole(plan), torch.Generator().manual_seed(len(parts))
        for share in wanted:
            scores = {s.name: torch.rand(s.groups, generator=draw) for s in plan.items}
            after = plan.lowered(kept, scores, share)
            plan.check(kept, after, share)
            assert not any(bool((after[n] & ~kept[n]).any()) for n in kept)
            assert plan.unpacked(plan.packed(after)).keys() == after.keys()
            if scope == "global":
                sizes = [plan.structures.size(s) for s in plan.items]
                total = sum(n * s.groups for n, s in zip(sizes, plan.items, strict=True))
                near = abs(plan.gone(after) - share) <= max(sizes) / 2 / total + 1e-9
                stuck = any(int(after[s.name].sum()) <= floor(s) for s in plan.items)
                assert near or stuck or share < plan.gone(kept)
            kept = after


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([[False, True], [True] * 20], "more is pruned than 0.050"),
        ([[True, True], [False] * 13 + [True] * 7], "s1: other groups"),
    ],
)
def test_what_no_ranking_gives_is_refused(found: list[list[bool]], said: str) -> None:
    plan = model()
    masks = {s.name: torch.tensor(m) for s, m in zip(plan.items, found, strict=True)}
    share = 0.05 if "more" in said else 0.9
    with pytest.raises(ValueError, match=said):
        plan.check(whole(plan), masks, share)
    grown = {"s0": torch.tensor([True, False]), "s1": torch.ones(20, dtype=torch.bool)}
    with pytest.raises(ValueError, match="s0: other groups"):
        plan.check(grown, whole(plan), 0.5)
