"""Losses of many clients at once against one client after another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clients.fedld import FORMS, FedLD
from fedsim.core.criteria import IGNORE, criterion

CLIENTS, BATCH, POSITIONS, CLASSES = 3, 4, 5, 7
RAGGED = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
TASKS = {
    "cross_entropy": ((CLIENTS, BATCH), True),
    "next_token": ((CLIENTS, BATCH, POSITIONS), True),
    "mse": ((CLIENTS, BATCH, 2), False),
}


def drawn(shape: tuple[int, ...], classes: bool, full: bool) -> tuple[Tensor, Tensor]:
    """Outputs, and targets of which some are to be ignored unless they are full."""
    stream = torch.Generator().manual_seed(3)
    wide = (*shape, CLASSES) if classes else shape
    outputs = torch.randn(*wide, generator=stream, dtype=torch.float64, requires_grad=True)
    if not classes:
        return outputs, torch.randn(*shape, generator=stream, dtype=torch.float64)
    target = torch.randint(0, CLASSES, shape, generator=stream)
    if not full:
        target[0, 1] = target[1, 0] = IGNORE
    return outputs, target


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("weight", [None, RAGGED], ids=["even", "ragged"])
def test_a_block_of_clients_has_the_losses_of_each(
    name: str, full: bool, weight: Tensor | None
) -> None:
    shape, classes = TASKS[name]
    judge, (outputs, target) = criterion(name), drawn(shape, classes, full)
    shares = [None] * CLIENTS if weight is None else list(weight)
    alone = torch.stack([judge(*each) for each in zip(outputs, target, shares, strict=True)])
    (slopes,) = torch.autograd.grad(alone.sum(), outputs)
    losses, found = judge.stacked(outputs.detach(), target, weight, full)
    torch.testing.assert_close(losses, alone.detach())
    torch.testing.assert_close(found, slopes)
    torch.testing.assert_close(replace(judge, many=True)(outputs, target, weight), alone)


@pytest.mark.parametrize("name", ["cross_entropy", "next_token"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [None, RAGGED], ids=["even", "ragged"])
def test_fedld_has_its_loss_along_one_axis(name: str, form: str, weight: Tensor | None) -> None:
    program, judge = FedLD(margin_lambda=0.3, margin_form=form), criterion(name)
    assert program.axial_loss
    outputs, target = drawn(TASKS[name][0], True, False)
    shares = [None] * CLIENTS if weight is None else list(weight)
    alone = [program.loss(judge, *each) for each in zip(outputs, target, shares, strict=True)]
    found = program.loss(replace(judge, many=True), outputs, target, weight)
    torch.testing.assert_close(found, torch.stack(alone))
