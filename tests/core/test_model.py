"""A module as a function of one vector, and the losses it is trained by."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.core.criteria import criterion
from fedsim.core.errors import ConfigError
from fedsim.core.model import FlatModel, is_stochastic, travelling
from tests.contract import toy

CE = criterion("cross_entropy")
DATA = toy.federated()
BATCH = {"x": DATA.fields["x"][:8], "y": DATA.fields["y"][:8]}


@pytest.mark.parametrize("kind", ["softmax", "mlp", "bn"])
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_is_autograds(kind: str, training: bool) -> None:
    module, model = toy.module(kind).train(training), FlatModel(toy.module(kind), CE)
    expected = cross_entropy(module(BATCH["x"]), BATCH["y"])
    expected.backward()
    record = model.initial()
    flat, beside = record.flat.clone(), {n: t.clone() for n, t in record.beside.items()}
    value, gradient = model.gradient(flat, beside, BATCH, CE, training)
    torch.testing.assert_close(value, expected.detach())
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradient[model.layout.span(name)], parameter.grad.flatten())
    state = model.layout.views(flat) | beside  # statistics follow in training, in place
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(state[name], buffer)
    assert model.module.training


def test_a_parameter_that_is_not_used_has_no_gradient() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    model = FlatModel(Half(), CE)
    _, gradient = model.gradient(model.initial().flat, {}, BATCH, CE)
    assert gradient[model.layout.span("idle.weight")].eq(0).all()
    assert gradient[model.layout.span("used.weight")].ne(0).any()


def test_measure_is_the_same_in_batches() -> None:
    model = FlatModel(toy.module("bn"), CE)
    index = torch.arange(23)
    whole = model.measure(model.initial(), DATA.fields, index)
    torch.testing.assert_close(whole, model.measure(model.initial(), DATA.fields, index, 5))
    outputs = toy.module("bn").eval()(DATA.fields["x"][:23])
    losses = cross_entropy(outputs, DATA.fields["y"][:23], reduction="none")
    right = outputs.argmax(1) == DATA.fields["y"][:23]
    torch.testing.assert_close(whole, torch.stack([losses.detach(), right.float(), torch.ones(23)]))
    assert model.measure(model.initial(), DATA.fields, index[:0]).shape == (3, 0)


def test_what_an_algorithm_may_know() -> None:
    info = FlatModel(toy.module("bn"), CE).info
    assert info.buffers == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert info.head == {"3.weight", "3.bias"}
    assert info.kinds["0.weight"] == "Linear"
    assert info.kinds["1.running_var"] == "BatchNorm1d"
    assert info.layout.trainable == tuple(n for n, _ in toy.module("bn").named_parameters())


def test_frozen_and_tied_parameters_travel_never_and_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.base.requires_grad_(False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(self.base(x)))
            return out

    assert list(travelling(Tied())) == ["one.weight", "one.bias", "two.bias"]
    model = FlatModel(Tied(), CE)
    zero = model.initial().flat * 0
    assert model.outputs(zero, {}, BATCH["x"]).eq(0).all()  # both ends of the tie are zero


@pytest.mark.parametrize(
    ("module", "stochastic"),
    [
        (nn.Dropout(0.5), True),
        (nn.Dropout(0.0), False),
        (nn.LSTM(2, 2, 2, dropout=0.1), True),
        (nn.LSTM(2, 2, 2), False),
        (nn.Linear(2, 2), False),
    ],
)
def test_dropout_is_noticed(module: nn.Module, stochastic: bool) -> None:
    assert is_stochastic(nn.Sequential(module)) == stochastic


# ------------------------------------------------------------------------------------- criteria


def test_padding_and_ignored_positions_do_not_count() -> None:
    z = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [9.0, -9.0]]])
    y = torch.tensor([[0, 1], [1, -100]])
    next_token = criterion("next_token")
    terms = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(2)]
    assert next_token(z, y).item() == pytest.approx(sum(terms) / 3)
    weight = torch.tensor([1.0, 0.0])
    assert next_token(z, y, weight).item() == pytest.approx(sum(terms[:2]) / 2)
    assert next_token(z, y, torch.zeros(2)).item() == 0
    measured = next_token.measure(z, y)
    assert measured[0].tolist() == pytest.approx([sum(terms[:2]), terms[2]])
    assert measured[1].tolist() == [2, 0]
    assert measured[2].tolist() == [2, 1]


def test_weights_of_one_are_no_weights() -> None:
    z, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    assert CE(z, y, torch.ones(2)).item() == pytest.approx(CE(z, y).item())
    mse = criterion("mse")
    assert mse(z[:, :1], torch.tensor([1.0, 2.0])).item() == pytest.approx((1 + 4) / 4)


def test_unknown_criteria_are_refused() -> None:
    with pytest.raises(ConfigError, match="hinge"):
        criterion("hinge")
