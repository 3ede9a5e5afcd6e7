"""Federated LoRA: exactness, ranks of clients, what travels, and what the base keeps."""

from __future__ import annotations

import logging

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from clients.hetlora import HetLoRA
from fedsim.config import Named, StrategyConfig
from fedsim.core.averaging import examples_of
from fedsim.core.errors import ConfigError
from fedsim.core.lora import Factors, flora
from fedsim.core.lora.serving import halves
from fedsim.core.program import LocalState
from fedsim.core.records import from_record
from fedsim.models import build
from fedsim.models.lora import LoRALinear, adapt
from fedsim.runner import build_strategy
from tests.contract import toy
from tests.contract.test_aggregation import aggregate

ALL = ("fedit", "flexlora", "hetlora", "ffa_lora", "rolora", "fedsa_lora", "lora_lego")
RANKS = {"ranks": [1, 2]}


def federation(name: str, model: str = "lora", **params):
    return toy.federation(StrategyConfig(name=name, params=params), model=model)


def factors(record, fed) -> dict[str, Factors]:
    sent = getattr(fed.strategy, "sent", None)  # what the record lacks, the server holds
    state = (
        from_record(fed.env.model.initial())
        | from_record(sent or ArrayRecord())
        | from_record(record)
    )
    return {m: Factors(state[a], state[b]) for m, (a, b) in halves(fed.setting.info).items()}


def one_round(fed, rounds: int = 0):
    """Models sent, replies, and the aggregate of the round after `rounds` others."""
    progress = fed.begin()
    for _ in range(rounds):
        fed.advance(progress)
    messages = toy.messages_of(fed, progress.arrays, rounds + 1)
    contents = toy.contents_of(fed, messages)
    return messages, contents, aggregate(fed.strategy, messages, contents, rounds + 1)


def exact_mean(fed, contents) -> dict[str, torch.Tensor]:
    adapters = [factors(c.array_records["arrays"], fed) for c in contents]
    mean = flora(adapters, [examples_of(c) for c in contents])
    return {m: f.delta() for m, f in mean.items()}


def gap(fed, arrays, contents) -> float:
    """Distance to the exact mean update, relative."""
    mean, found = exact_mean(fed, contents), factors(arrays, fed)
    return max(float((found[m].delta() - d).norm() / d.norm()) for m, d in mean.items())


@pytest.mark.parametrize("rounds", [0, 1, 2])
@pytest.mark.parametrize("name", ["ffa_lora", "rolora"])
def test_one_factor_at_a_time_is_exact(name: str, rounds: int) -> None:
    fed = federation(name)
    _, contents, arrays = one_round(fed, rounds)
    assert gap(fed, arrays, contents) < 1e-5


def test_fedit_is_not_and_flexlora_is_nearest() -> None:
    fedit, flexlora = (federation(n) for n in ("fedit", "flexlora"))
    gaps = [gap(fed, *one_round(fed, 2)[:0:-1]) for fed in (fedit, flexlora)]
    assert gaps[1] < gaps[0]
    assert gaps[0] > 1e-4


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "lora_lego"])
def test_clients_of_lower_rank_stay_there(name: str) -> None:
    fed = federation(name, **RANKS)
    messages, contents, arrays = one_round(fed, 2)
    for message, content in zip(messages, contents, strict=True):
        rank = RANKS["ranks"][(message.metadata.dst_node_id - 1) % 2]
        for record in (message.content.array_records["arrays"], content.array_records["arrays"]):
            for f in factors(record, fed).values():
                assert f.a[:rank].any()
                assert not f.a[rank:].any()
                assert not f.b[:, rank:].any()
    served = fed.strategy.models(arrays)
    assert {n: list(s.clients) for n, s in served.items()} == {
        "rank-1": [1, 3, 5, 7], "rank-2": [2, 4, 6]}  # fmt: skip
    assert torch.linalg.matrix_rank(factors(served["rank-1"].arrays, fed)["0"].delta()) == 1


def test_flexlora_sends_the_best_of_each_rank() -> None:
    fed = federation("flexlora", **RANKS)
    _, contents, arrays = one_round(fed, 1)
    for module, mean in exact_mean(fed, contents).items():
        u, s, vt = torch.linalg.svd(mean)
        for rank in (1, 2):
            record = fed.strategy.record_for(rank, arrays)
            best = u[:, :rank] * s[:rank] @ vt[:rank]
            assert torch.allclose(factors(record, fed)[module].delta(), best, atol=1e-5)


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "lora_lego"])
def test_ranks_survive_a_restart(name: str) -> None:
    params = {**RANKS, **({"gamma": 0.5, "penalty": 1.0} if name == "hetlora" else {})}
    whole = toy.run(federation(name, **params), 3)
    fed = federation(name, **params)
    progress = toy.run(fed, 2)
    fresh = federation(name, **params)
    fresh.strategy.load_state_dict(fed.strategy.state_dict())
    fresh.advance(progress)
    assert toy.sha256(progress.arrays) == toy.sha256(whole.arrays)


def test_hetlora_prunes_clients_for_good() -> None:
    fed = federation("hetlora", gamma=0.5, penalty=5.0)
    progress = toy.run(fed, 3)
    assert fed.strategy.pruned
    assert set(fed.strategy.pruned.values()) == {1}
    means = [r["rank_mean"] for r in progress.rounds[1:]]
    assert means == sorted(means, reverse=True)
    assert means[-1] < 2
    assert not toy.run(kept := federation("hetlora", gamma=1.0), 2).rounds[-1]["abandoned"]
    assert kept.strategy.pruned == {}


def test_hetlora_penalty_has_the_gradient_of_autograd() -> None:
    info = federation("hetlora").setting.info
    program = HetLoRA(rank=2, gamma=0.5, penalty=0.3).fitted(info)
    g = torch.Generator().manual_seed(1)
    s = LocalState()
    s.w = torch.randn(3, info.layout.num_trainable, generator=g, dtype=torch.float64)
    at = s.w.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(0.3 * program.tail(at).sum(), at)
    found = program.correction(s)
    assert found is not None
    assert torch.allclose(found, wanted)
    assert HetLoRA(rank=2, penalty=0.0).fitted(info).correction(s) is None


def test_lego_says_that_it_degenerates(caplog: pytest.LogCaptureFixture) -> None:
    fed = federation("lora_lego", weighted=False)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        progress = toy.run(fed, 3)
    assert sum("same rank of every client" in r.message for r in caplog.records) == 1
    assert all(r["lego_gamma_mean"] >= 1 for r in progress.rounds[1:])
    assert progress.rounds[1]["lego_degenerate"] == 1
    plain = toy.run(federation("fedit", weighted=False), 1).arrays
    lego = toy.run(federation("lora_lego", weighted=False), 1).arrays
    assert toy.close(lego, plain, 1e-6)


def test_reweighting_is_off_where_it_would_compound() -> None:
    for mode in ("replace", "merge_and_reinit", "residual"):
        options = build_strategy(StrategyConfig(name="lora_lego", params={"mode": mode})).options
        assert options.parameter_reweight == options.output_reweight == (mode != "replace")
    asked = {"parameter_reweight": True, "output_reweight": True}
    options = build_strategy(StrategyConfig(name="lora_lego", params=asked)).options
    assert options.parameter_reweight
    assert options.output_reweight


@pytest.mark.parametrize("name", ALL)
def test_only_adapters_travel(name: str) -> None:
    fed = federation(name)
    messages, contents, _ = one_round(fed)
    sent = {"ffa_lora": {"lora_B"}, "fedsa_lora": {"lora_A"}}.get(name, {"lora_A", "lora_B"})
    back = {"lora_B"} if name == "rolora" else sent  # of the first round
    for content, names in ((messages[0].content, sent), (contents[0], back)):
        assert {n.rpartition(".")[2] for n in content.array_records["arrays"]} == names


@pytest.mark.parametrize("name", ALL)
def test_the_base_is_left_alone(name: str) -> None:
    fed = federation(name)
    module = fed.env.model.module
    before = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    toy.run(fed, 2)
    after = dict(module.named_parameters())
    assert before
    assert all(torch.equal(after[n], p) for n, p in before.items())


@pytest.mark.parametrize("name", ALL)
def test_a_model_without_adapters_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="needs low-rank updates"):
        federation(name, model="mlp")


def test_ranks_must_fit() -> None:
    with pytest.raises(ConfigError, match="at most the model's rank 2"):
        federation("flexlora", ranks=[1, 3])
    with pytest.raises(ConfigError, match="1 or above"):
        federation("flexlora", ranks=[0])


# ------------------------------------------------------------------------ the model


def test_wrapped_model_starts_as_its_base() -> None:
    data = toy.federated()
    spec = {"base": "mlp", "rank": 3, "base_params": {"hidden": [6]}}
    model = build(Named(name="lora", params=spec), data, 5)
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 2
    x = data.fields["x"][:4]
    base = nn.Sequential(*(m.base if isinstance(m, LoRALinear) else m for m in model))
    assert torch.equal(model(x), base(x))
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    nn.init.ones_(layers[1].lora_B)
    dense = layers[1].scaling * layers[1].lora_B @ layers[1].lora_A
    hidden = model[:-1](x)
    assert torch.allclose(model(x), base[-1](hidden) + hidden @ dense.T, atol=1e-6)


def test_targets_and_head() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 1))

    some = adapt(net(), 2, 1.0, targets=["2"], head=True)
    trained = {n for n, p in some.named_parameters() if p.requires_grad}
    assert trained == {"2.lora_A", "2.lora_B", "3.weight", "3.bias"}
    assert isinstance(adapt(nn.Linear(2, 3), 2, 1.0), LoRALinear)
    with pytest.raises(ConfigError, match="is no linear layer"):
        adapt(net(), 2, 1.0, targets=["q"])
    with pytest.raises(ConfigError, match="needs a base with linear layers"):
        adapt(nn.ReLU(), 2, 1.0)
