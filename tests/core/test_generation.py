"""Greedy decoding, Rouge-L and exact match."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsim.core.generation import exact_match, greedy, judge, rouge_l, split


def counting(tokens: Tensor) -> Tensor:
    """A model that always says the next number."""
    return torch.nn.functional.one_hot((tokens + 1) % 10, 10).float()


def test_greedy_goes_on_until_the_end() -> None:
    assert greedy(counting, [[2]], end=6, most=20, context=50) == [[3, 4, 5]]
    assert greedy(counting, [[2]], end=6, most=2) == [[3, 4]]
    assert greedy(counting, [[2, 3]], end=6, most=9, context=2) == [[4]]
    together = greedy(counting, [[2], [9, 4], [5, 5, 5]], end=6, most=9)
    assert together == [[3, 4, 5], [5], []]


def test_ties_go_to_the_lower_number() -> None:
    assert greedy(lambda t: torch.zeros(*t.shape, 5), [[1]], end=4, most=2) == [[0, 0]]


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat", 1.0),
        ("the cat", "the cat sat down", 2 * 1 * 0.5 / 1.5),
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("a b c d", "d c b a", 0.25),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_rouge_l(said: str, reference: str, expected: float) -> None:
    assert rouge_l(said, reference) == pytest.approx(expected)


def test_exact_match() -> None:
    assert exact_match(" Yes\n", "yes") == 1.0
    assert exact_match("yes!", "yes") == 0.0


def test_judge() -> None:
    x = torch.tensor([[1, 2, 3, 4, 5], [1, 5, 6, 9, 9]])
    y = torch.tensor([[-100, 3, 4, 5, 9], [-100, -100, 9, -100, -100]])
    assert split(x[0], y[0]) == ([1, 2], [3, 4, 5, 9])
    found = judge(counting, x, y, lambda t: " ".join(map(str, t)), end=9, most=9)
    assert found["exact_match"] == 0.0  # it says 3 4 5 6 7 8, and 7 8
    assert found["rouge_l"] == pytest.approx((2 * 0.5 * 1 / 1.5 + 0) / 2)
