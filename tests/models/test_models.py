"""The built-in models, and what is said of models that do not fit."""

from __future__ import annotations

import sys
from math import log

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fedsim.config import Named
from fedsim.core.errors import ConfigError
from fedsim.data import FederatedData, Ragged
from fedsim.models import build
from fedsim.models.catalogue import MODELS
from fedsim.registry import describe, plain


def data_of(x: torch.Tensor, y: torch.Tensor, criterion: str, outputs: int) -> FederatedData:
    nobody = Ragged.from_lists([])
    none = np.arange(0)
    return FederatedData("toy", {"x": x, "y": y}, nobody, nobody, none, criterion, outputs,
                         tuple(x.shape[1:]), (), none, None, "", {})  # fmt: skip


def images(*shape: int) -> FederatedData:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (6,), generator=generator)
    return data_of(torch.randn(6, *shape, generator=generator), y, "cross_entropy", 10)


def text(length: int = 12, vocabulary: int = 20) -> FederatedData:
    tokens = torch.randint(vocabulary, (6, length + 1), generator=torch.Generator().manual_seed(0))
    return data_of(tokens[:, :-1], tokens[:, 1:], "next_token", vocabulary)


def make(name: str, data: FederatedData, seed: int = 0, **params) -> nn.Module:
    return build(Named(name=name, params=params), data, seed)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


SMALL = {"kernel": 3, "padding": 0, "hidden": [64]}


@pytest.mark.parametrize(
    ("name", "shape", "params", "parameters"),
    [
        ("logistic", (1, 28, 28), {}, 784 * 10 + 10),
        ("mlp", (1, 28, 28), {}, 50_890),
        ("mlp", (5,), {"hidden": [7, 3]}, 5 * 7 + 7 + 7 * 3 + 3 + 3 * 10 + 10),
        # McMahan et al. 2017, "A CNN with two 5x5 convolution layers ... 1,663,370 parameters".
        ("cnn", (1, 28, 28), {}, 1_663_370),
        ("cnn", (3, 32, 32), SMALL, 167_562),
        ("cnn", (3, 32, 32), {}, 2_156_490),
        ("cnn", (1, 8, 8), {}, 188_810),
        ("cnn", (1, 8, 8), {"channels": [4], "hidden": []}, 4 * 25 + 4 + 4 * 16 * 10 + 10),
    ],
)
def test_sizes(name, shape, params, parameters):
    data = images(*shape)
    model = make(name, data, **params)
    assert count(model) == parameters
    assert model(data.fields["x"]).shape == (6, 10)


@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn"])
def test_vision_models_are_stacks_of_plain_layers(name):
    model = make(name, images(1, 8, 8))
    assert isinstance(model, nn.Sequential)
    kinds = {type(layer) for layer in model}
    assert kinds <= {nn.Flatten, nn.Linear, nn.ReLU, nn.Conv2d, nn.MaxPool2d}
    assert isinstance(model[-1], nn.Linear)
    assert not list(model.buffers())


@pytest.mark.parametrize(("name", "params"), [("char_lstm", {"hidden": 16}), ("char_gpt", {})])
def test_text_models_do_not_see_the_future(name, params):
    data = text()
    model = make(name, data, **params)
    tokens = data.fields["x"]
    scores = model(tokens)
    assert scores.shape == (6, 12, 20)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 20
    others = model(changed)
    assert torch.equal(scores[:, :7], others[:, :7])
    assert not torch.allclose(scores[:, 7:], others[:, 7:])
    loss = F.cross_entropy(scores.flatten(0, 1), data.fields["y"].flatten())
    assert loss.item() == pytest.approx(log(20), rel=0.1)


def test_char_lstm_is_leafs():
    model = make("char_lstm", text(80, 80))
    lstm = sum(4 * 256 * (i + 256 + 2) for i in (8, 256))
    assert count(model) == 80 * 8 + lstm + 256 * 80 + 80


def test_char_gpt_learns():
    data = text(16, 8)
    model = make("char_gpt", data, width=32)
    x, y = data.fields["x"], data.fields["y"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


@pytest.mark.parametrize("name", [name for name in MODELS if plain("models", name)])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_many_clients_at_once_give_what_one_gives(name):
    data = text() if name.startswith("char") or name == "offsite" else images(1, 8, 8)
    small = {"char_lstm": {"hidden": 8}, "char_gpt": {"width": 16}, "cnn": {"channels": [3, 4]}}
    small["offsite"] = {"base_params": {"width": 16, "layers": 3}}
    model = make(name, data, **small.get(name, {})).double()
    x, y = (data.fields[f].unflatten(0, (3, 2)) for f in ("x", "y"))
    x = x.double() if x.is_floating_point() else x
    weights = {n: p.detach() for n, p in model.named_parameters()}
    stacked = {n: torch.stack([p, p + 0.01, p - 0.01]) for n, p in weights.items()}

    def loss(parameters, x, y):
        scores = functional_call(model, parameters, (x,))
        return F.cross_entropy(scores.flatten(0, -2), y.flatten())

    together = vmap(grad(loss))(stacked, x, y)
    for client in range(3):
        alone = grad(loss)({n: p[client] for n, p in stacked.items()}, x[client], y[client])
        for n, value in alone.items():
            assert torch.allclose(together[n][client], value, atol=1e-12)


def test_char_gpt_has_second_derivatives():
    model = make("char_gpt", text(), width=8, heads=2, layers=1)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    x = text().fields["x"]

    def level(parameters):
        return functional_call(model, parameters, (x,)).square().mean()

    def slope(parameters):
        return sum(g.square().sum() for g in grad(level)(parameters).values())

    assert any(g.abs().max() > 0 for g in grad(slope)(weights).values())


def test_seeds_and_the_global_generator():
    data = images(1, 8, 8)
    before = torch.default_generator.get_state()
    one, same, other = (make("mlp", data, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.default_generator.get_state())
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert one.training


class Mine(nn.Module):
    """A user's model."""

    def __init__(self, input_shape, num_outputs, width: int = 3):
        super().__init__()
        self.a = nn.Linear(input_shape[0], width)
        self.norm = nn.BatchNorm1d(width)
        self.b = nn.Linear(width, num_outputs)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


def test_a_users_own_class(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    model = make("mine:Mine", images(5), width=4)
    assert count(model) == 5 * 4 + 4 + 8 + 4 * 10 + 10
    assert model.norm.num_batches_tracked == 0
    with pytest.raises(
        ConfigError, match=r"model.widht = 4: unknown parameter of Mine; did you mean width"
    ):
        make("mine:Mine", images(5), widht=4)
    with pytest.raises(ConfigError, match=r"cannot read x of shape \(2, 5, 5\)"):
        make("mine:Mine", images(5, 5))


def wrong_size(data):
    return nn.Linear(data.input_shape[0], 3)


def no_module():
    return 3


def test_users_models_that_do_not_fit(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    with pytest.raises(ConfigError, match=r"gives outputs \(2, 3\) .* \(2, 10\) is needed"):
        make("mine:wrong_size", images(5))
    with pytest.raises(ConfigError, match=r"gave int; a torch.nn.Module is needed"):
        make("mine:no_module", images(5))


def test_regression_outputs():
    data = data_of(torch.randn(6, 4), torch.randn(6), "mse", 1)
    assert make("logistic", data)(data.fields["x"]).shape == (6, 1)


@pytest.mark.parametrize(
    ("name", "data", "params", "words"),
    [
        ("mlp", images(5), {"hidden": [0]}, r"model.hidden = \[0\] .* 1 or more"),
        ("mlp", images(5), {"hidden": 3}, r"model.hidden = 3"),
        ("mlp", images(5), {"hiden": [3]}, r"did you mean hidden"),
        ("cnn", images(5), {}, r"needs images .* \(5,\)"),
        ("cnn", images(1, 8, 8), {"kernel": 3, "padding": 0}, r"model.channels = .* shrinks"),
        ("cnn", images(1, 8, 8), {"kernel": 0}, r"model.kernel"),
        ("cnn", images(1, 8, 8), {"padding": 5}, r"model.padding = 5 .* 0 to 4"),
        ("cnn", text(), {}, r"choose char_lstm or char_gpt"),
        ("char_gpt", images(5), {}, r"needs text .*|choose logistic"),
        ("char_gpt", text(), {"heads": 3}, r"model.heads = 3 .* divisors of model.width = 64"),
        ("char_gpt", text(), {"context": 5}, r"model.context = 5 .* 12"),
        ("char_lstm", text(), {"layers": 0}, r"model.layers = 0 .* 1 or more"),
        ("mlpp", images(5), {}, r"mlp"),
    ],
)
def test_wrong_requests(name, data, params, words):
    with pytest.raises(ConfigError, match=words):
        make(name, data, **params)


@pytest.mark.parametrize("name", MODELS)
def test_described(name):
    assert len(describe("models", name)) > 20
