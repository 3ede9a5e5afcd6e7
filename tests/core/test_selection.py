"""Which examples to have labelled: KSAS by its golden numbers, and what each rule is for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core import rng
from fedsim.core.selection import badge, best, coreset, entropy, ksas, logo, margin

LOCAL = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
SHARED = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)


def stream():
    return rng.stream(0, 0, 0, "test")


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1, 1, 1), 0.9477797653),
        ((8, 1, 1), 0.4420336917),
        ((4, 4, 0), 0.9177834849),
    ],
)
def test_golden_scores(counts, expected):
    # D = 1/2 sum (P - Q)(log P - log Q), P = softmax(z_i + log n), Q = softmax(z_g + log n)
    n = torch.tensor(counts, dtype=torch.float64)
    assert ksas(LOCAL, SHARED, n).item() == pytest.approx(expected, abs=1e-10)


def official(local, shared, counts):
    """The scores as the official code writes them, absent classes included."""
    shift = counts.float().log()
    p, q = (local + shift).float(), (shared + shift).float()
    one = F.kl_div(p.log_softmax(-1), q.softmax(-1), reduction="none").sum(1)
    other = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(1)
    return 0.5 * (one + other)


def test_the_official_expression_is_nan_where_a_class_is_absent():
    draw = torch.Generator().manual_seed(0)
    local, shared = torch.randn(2, 50, 4, generator=draw)
    counts = torch.tensor([5.0, 3.0, 0.0, 2.0])
    assert official(local, shared, counts).isnan().all()
    torch.testing.assert_close(
        official(local, shared, counts + 1e-6).double(), ksas(local, shared, counts),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    whole = torch.tensor([5.0, 3.0, 1.0, 2.0])
    torch.testing.assert_close(
        official(local, shared, whole).double(), ksas(local, shared, whole), rtol=1e-4, atol=1e-5
    )


def test_properties_of_scores():
    draw = torch.Generator().manual_seed(1)
    local, shared = 20 * torch.randn(2, 40, 5, generator=draw)
    counts = torch.tensor([7.0, 1.0, 0.0, 4.0, 2.0])
    scores = ksas(local, shared, counts)
    assert (scores >= 0).all()
    assert ksas(local, local, counts).abs().max() == 0
    torch.testing.assert_close(ksas(shared, local, counts), scores)
    torch.testing.assert_close(ksas(local + 3, shared - 2, counts), scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ksas(local, shared, counts * 9), scores)
    p, q = local.double().softmax(-1), shared.double().softmax(-1)
    plain = 0.5 * ((p - q) * (p / q).log()).sum(-1)
    torch.testing.assert_close(ksas(local, shared, torch.ones(5)), plain)
    for counts in (torch.tensor([0.0, 0, 3, 0, 0]), torch.zeros(5)):  # one class, or none
        assert ksas(local, shared, counts).abs().max() == 0
    assert ksas(local.sign() * 80, shared.sign() * -80, torch.ones(5)).isfinite().all()


def test_scores_vanish_just_where_models_agree_on_the_classes_that_a_client_has():
    local = torch.randn(20, 4, generator=torch.Generator().manual_seed(2))
    counts = torch.tensor([3.0, 0.0, 2.0, 1.0])
    absent, present = local.clone(), local.clone()
    absent[:, 1] += 5
    present[:, 2] += 0.1
    assert ksas(local, absent, counts).abs().max() < 1e-12
    assert ksas(local, present, counts).min() > 1e-6


def test_the_best_are_taken_and_ties_are_decided_by_lot():
    scores = torch.tensor([0.1, 5.0, 0.3, 4.0])
    assert sorted(best(scores, 2, stream()).tolist()) == [1, 3]
    zeros = torch.zeros(100)
    first, again = best(zeros, 10, stream()), best(zeros, 10, stream())
    assert first.tolist() == again.tolist() != list(range(10))


@given(st.lists(st.floats(0, 9), min_size=1, max_size=30), st.data())
def test_nothing_better_is_left_than_what_was_taken(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    taken = set(best(torch.tensor(scores, dtype=torch.float64), count, stream()).tolist())
    assert len(taken) == count
    left = [s for i, s in enumerate(scores) if i not in taken]
    assert not taken or not left or min(scores[i] for i in taken) >= max(left)


def test_other_rules_choose_what_they_are_for():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.9, -9.0]])
    assert entropy(logits).argmax() == 1
    assert margin(logits).argmax() == 1
    far = torch.tensor([[0.0, 0], [0.1, 0], [9, 9], [0, 0.1]])
    assert coreset(far, far[:1], 1, stream()).tolist() == [2]
    assert len(set(coreset(torch.zeros(5, 2), torch.zeros(1, 2), 5, stream()).tolist())) == 5
    features = torch.eye(4).repeat(3, 1)
    picked = badge(features, torch.zeros(12, 3), 4, stream())
    assert len({i % 4 for i in picked.tolist()}) == 4  # copies of a chosen one have no chance
    unclear = torch.zeros(12, 3)
    unclear[4:] += torch.tensor([3.0, 0.0, 0.0])
    local = features, torch.zeros(12, 3)
    assert sorted(logo(local, unclear, 4, stream()).tolist()) == [0, 1, 2, 3]
    assert len(set(logo(local, unclear, 7, stream()).tolist())) == 7
