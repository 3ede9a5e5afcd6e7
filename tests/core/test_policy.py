"""Policies for pruning steps and ranks: the bandit's tree, its bounds, and the reward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.core.errors import ConfigError
from fedsim.core.policy import Action, Fixed, Oracle, Random, TreeUCB, made, rewards


def play(policy: TreeUCB, rounds: int, worth: Any, seed: int = 0) -> list[float]:
    got = []
    for number in range(rounds):
        action = policy.select(0, np.random.Generator(np.random.Philox(seed * 10_000 + number)))
        got.append(worth(*action.place))
        policy.observe(0, action, got[-1])
    return got


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 60))
def test_leaves_tile_the_space(seed: int, rounds: int) -> None:
    policy = TreeUCB(1, 16)
    draw = np.random.Generator(np.random.Philox(seed))
    play(policy, rounds, lambda x, y: float(draw.random()), seed)
    leaves = policy.trees[0].leaves
    assert sum(a * b for a, b in (leaf.sides for leaf in leaves)) == pytest.approx(1.0)
    for point in draw.random((50, 2)):
        assert sum(leaf.holds(point) for leaf in leaves) == 1
    assert sum(leaf.holds((1.0, 1.0)) for leaf in leaves) == 1


def test_an_untried_leaf_comes_first() -> None:
    policy = TreeUCB(1, 16, split_after=2)
    play(policy, 2, lambda x, y: 1.0)
    tree = policy.trees[0]
    assert len(tree.leaves) == 2
    untried = [b == float("inf") for b in policy.bounds(tree)]
    if any(untried):
        action = policy.select(0, np.random.Generator(np.random.Philox(5)))
        assert tree.leaves[untried.index(True)].holds(action.place)


def test_the_bound_by_hand() -> None:
    """Two observations, 0.2 then 0.6, discount 0.5: N = 1.5, R = 0.7 / 1.5; the whole space."""
    policy = TreeUCB(1, 16, discount=0.5, split_after=9)
    policy.observe(0, Action(0.1, 1, (0.1, 0.1)), 0.2)
    policy.observe(0, Action(0.9, 1, (0.9, 0.9)), 0.6)
    (bound,) = policy.bounds(policy.trees[0])
    assert bound == pytest.approx(0.7 / 1.5 + np.sqrt(2 * np.log(1.5) / 1.5))


def test_it_finds_the_best_corner_and_regret_slows_down() -> None:
    """Reward 1 - |(x, y) - (0.8, 0.3)|^2: the later half of 400 rounds is better than the first."""
    policy = TreeUCB(1, 16, exploration=0.3, discount=1.0)
    got = play(policy, 400, lambda x, y: 1 - (x - 0.8) ** 2 - (y - 0.3) ** 2)
    tree = policy.trees[0]
    visits = [
        sum(leaf.holds(p[:2]) for p in tree.points) / np.prod(leaf.sides) for leaf in tree.leaves
    ]
    busiest = tree.leaves[int(np.argmax(visits))]
    centre = [(a + b) / 2 for a, b in zip(busiest.low, busiest.high, strict=True)]
    assert abs(centre[0] - 0.8) < 0.25
    assert abs(centre[1] - 0.3) < 0.25
    first, second = 1 - np.mean(got[:200]), 1 - np.mean(got[200:])
    assert second < 0.7 * first


def test_what_it_learned_survives() -> None:
    one, two = TreeUCB(2, 8), TreeUCB(2, 8)
    play(one, 12, lambda x, y: x)
    two.load_state_dict(one.state_dict())
    assert two.trees == one.trees
    assert two.state_dict() == one.state_dict()


def test_at_equal_utility_the_client_nearest_to_the_mean_gets_most() -> None:
    found = rewards([0.5] * 3, [0.5] * 3, [1.0] * 3, [1.0, 2.1, 3.2])
    assert max(found) == found[1]


def test_the_reward_by_hand() -> None:
    """(0.3 + 0.6 + 1) / 3 = 0.6333 for the larger update; T = 3 of mean 2: divided by 1.5."""
    assert rewards([0.3, 0.3], [0.6, 0.6], [2.0, 1.0], [3.0, 1.0]) == pytest.approx(
        [1.9 / 3 / 1.5, 1.4 / 3 / 1.5]
    )


@given(
    st.lists(st.tuples(*[st.floats(allow_nan=True)] * 2, st.floats(0, 1e6)), min_size=1, max_size=9)
)
def test_rewards_stay_between_0_and_1(said: list[tuple[float, float, float]]) -> None:
    gains, progress, norms = (list(column) for column in zip(*said, strict=True))
    assert all(0 <= r <= 1 for r in rewards(gains, progress, norms, [1.0] * len(said)))


def test_time_of_zero_is_no_division() -> None:
    assert rewards([1.0], [1.0], [1.0], [0.0]) == [1.0]


def test_ranks_are_powers_of_two() -> None:
    policy = Random(2, 16)
    draw = np.random.Generator(np.random.Philox(1))
    ranks = {policy.select(0, draw).rank for _ in range(200)}
    assert ranks == {2, 4, 8, 16}
    assert Fixed(2, 12).select(0, draw) == Action(1.0, 12)
    assert max(Random(2, 12).rank_at(x) for x in (0.0, 0.5, 1.0)) == 12


def test_the_oracle_prunes_the_slow() -> None:
    policy = Oracle(1, 4, [1.0, 1.5, 3.0])
    draw = np.random.Generator(np.random.Philox(1))
    assert [policy.select(c, draw).step for c in range(3)] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("greedy", "policy = greedy must be ucb_tree or fixed or random or oracle"),
        ({"name": "ucb_tree", "depth": 3}, "policy = depth must be of: discount, exploration"),
        ({"name": "ucb_tree", "discount": 2.0}, "discount = 2.0 must be above 0, at most 1"),
        ({"name": "random", "lowest": 64}, "policy.lowest = 64 must be from 1 to 8"),
        ({"name": "oracle"}, "policy.speeds = None must be a table"),
        ({"name": "oracle", "speeds": {"phone": 1.0}}, "policy.speeds = "),
        ({"name": "ucb_tree", "exploration": "much"}, "must hold numbers"),
    ],
)
def test_a_wrong_policy_is_named(policy: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made(policy, 8, ("jetson_nx",))
