"""KnFu and its relatives: golden numbers of the fusion, and what holds of any knowledge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from clients.knfu import Digestion
from fedsim.config import StrategyConfig
from fedsim.core.criteria import criterion
from fedsim.core.distill import LOSSES, divergence
from fedsim.core.errors import ConfigError
from fedsim.core.knowledge import (
    DISTANCES,
    ESTIMATES,
    WEIGHTINGS,
    distances,
    effectiveness,
    fuse,
    kulsif,
)
from fedsim.core.model import FlatModel
from fedsim.core.records import from_record, to_record
from strategies.fedmd import FedMD, SelectiveFD
from strategies.knfu import KnFu
from tests.contract import toy

P = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]])


def entry(name="knfu", **params):
    return StrategyConfig(name=name, params=params)


def knowledge(clients=5, count=8, classes=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(clients, count, classes, generator=draw)).softmax(-1)


# ---------------------------------------------------------------------------- the fusion


def test_golden_distances_and_weights():
    # KL(p_n || p_m) of (.9,.1), (.8,.2), (.1,.9), and softmax(-beta KL) of its rows
    delta = distances(P)
    expected = [[0, 0.0367, 1.7578], [0.0444, 0, 1.3627], [1.7578, 1.1457, 0]]
    np.testing.assert_allclose(delta, expected, atol=5e-5)
    one = effectiveness(delta, 1.0)
    np.testing.assert_allclose(one[0], [0.4681, 0.4512, 0.0807], atol=5e-5)
    ten = effectiveness(delta, 10.0)
    np.testing.assert_allclose(ten[0], [0.59071, 0.40929, 1.4e-8], atol=5e-6)
    np.testing.assert_allclose(ten[2], [2.3e-8, 1.1e-5, 0.99999], atol=5e-6)
    assert float(ten[0, 2]) == pytest.approx(1.4e-8, rel=0.05)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", DISTANCES)
def test_weights_are_shares_and_fall_with_distance(kind, weighting):
    said = knowledge()
    delta = distances(ESTIMATES["mean_softmax"](said), kind)
    assert (delta >= 0).all()
    assert delta.diagonal().abs().max() == 0
    weights = effectiveness(delta, 3.0, weighting, neighbours=2, radius=0.05)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))
    assert (weights.diagonal() > 0).all()
    order = delta.argsort(1)
    assert (weights.gather(1, order).diff(dim=1) <= 1e-12).all()
    fused = fuse(weights, said)
    torch.testing.assert_close(fused.sum(-1), torch.ones(5, 8))
    assert (fused <= said.amax(0) + 1e-6).all()
    assert (fused >= said.amin(0) - 1e-6).all()


def test_no_sharpness_is_the_mean_and_all_sharpness_is_the_own():
    said = knowledge()
    delta = distances(ESTIMATES["mean_softmax"](said))
    for beta_or_delta in (effectiveness(delta, 0.0), effectiveness(torch.zeros(5, 5).double())):
        torch.testing.assert_close(beta_or_delta, torch.full((5, 5), 0.2, dtype=torch.float64))
    mean = fuse(effectiveness(delta, 0.0), said)
    torch.testing.assert_close(mean, said.mean(0).expand_as(said))
    torch.testing.assert_close(fuse(effectiveness(delta, 1e9), said), said)


def test_relabelling_clients_and_reordering_examples():
    said = knowledge()
    order, rows = torch.tensor([3, 0, 4, 1, 2]), torch.randperm(8, generator=torch.Generator())

    def both(s):
        weights = effectiveness(distances(ESTIMATES["mean_softmax"](s)))
        return weights, fuse(weights, s)

    weights, fused = both(said)
    again, mixed = both(said[order])
    torch.testing.assert_close(again, weights[order][:, order])
    torch.testing.assert_close(mixed, fused[order])
    same, moved = both(said[:, rows])
    torch.testing.assert_close(same, weights)
    torch.testing.assert_close(moved, fused[:, rows])
    twins = torch.cat([said, said[:1]])
    weights, _ = both(twins)
    torch.testing.assert_close(weights[0], weights[5])
    torch.testing.assert_close(weights[:, 0], weights[:, 5])


def test_self_can_be_left_out_unless_nobody_is_near():
    delta = torch.tensor([[0.0, 9.0], [9.0, 0.0]])
    out = effectiveness(delta, include_self=False)
    assert out.tolist() == [[0, 1], [1, 0]]
    alone = effectiveness(delta, weighting="threshold", radius=0.1, include_self=False)
    assert alone.tolist() == [[1, 0], [0, 1]]
    assert effectiveness(torch.zeros(1, 1), include_self=False).tolist() == [[1]]


def test_losses_and_their_factors():
    z, target = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), None
    target = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).softmax(-1)
    batchmean = torch.nn.functional.kl_div(z.log_softmax(-1), target, reduction="batchmean")
    torch.testing.assert_close(LOSSES["kl"](z, target, 1.0), batchmean)
    torch.testing.assert_close(divergence(target, z, over_classes=True).mean(), batchmean / 4)
    soft = torch.nn.functional.cross_entropy(z, target)
    torch.testing.assert_close(LOSSES["ce_soft"](z, target, 1.0), soft)
    own = z.clone().requires_grad_()
    loss = Digestion(temperature=2.0).loss(
        criterion("cross_entropy"), own, (z / 2).softmax(-1), None
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(own.grad.abs().max()) < 1e-6
    hard = torch.tensor([[1.0, 0.0]])
    assert divergence(hard, torch.zeros(1, 2)).isfinite().all()


def test_density_ratios_against_their_equations():
    draw = torch.Generator().manual_seed(0)
    known = 0.3 * torch.randn(30, 2, generator=draw).double()
    noise = 6 * torch.rand(40, 2, generator=draw).double() - 3
    ratio = kulsif(known, noise, 0.7, 1e-2)
    # The estimator minimises 1/2n sum r(noise)^2 - 1/m sum r(known) + ridge/2 |r|^2: its
    # coefficients on the known points are 1/(m ridge), so the residual on the noise vanishes.
    near, far = ratio(torch.zeros(1, 2)), ratio(torch.full((1, 2), 2.5))
    assert float(near) > 5 * abs(float(far))

    def kernel(a, b):
        return (-torch.cdist(a, b).square() / (2 * 0.7**2)).exp()

    alpha = -ratio(noise) / (40 * 1e-2)
    rebuilt = kernel(noise, noise) @ alpha + kernel(noise, known).sum(1) / (30 * 1e-2)
    torch.testing.assert_close(rebuilt, ratio(noise))


# ---------------------------------------------------------------------------- federations


def grouped(groups=(0, 0, 1, 1), sizes=24):
    """Clients of two kinds, who have seen the classes 0 and 1, or only the class 2."""
    data = toy.federated((sizes,) * len(groups))
    draw = np.random.default_rng(0)
    x, y = data.fields["x"], data.fields["y"]
    for client, group in enumerate(groups):
        rows = torch.from_numpy(data.train[client].copy())
        y[rows] = torch.from_numpy(draw.integers(0, 2, len(rows)) if group == 0 else
                                   np.full(len(rows), 2))  # fmt: skip
        x[rows] = 3 * torch.nn.functional.one_hot(y[rows], 4).float()
        x[rows] += 0.3 * torch.from_numpy(draw.normal(size=(len(rows), 4))).float()
    public = torch.from_numpy(data.public.copy())
    turns = torch.arange(len(public)) % 3
    x[public] = 3 * torch.nn.functional.one_hot(turns, 4).float()
    return data


def test_clients_with_other_classes_have_nothing_to_say_to_each_other():
    options = {"data": grouped(), "train": {"lr": 0.5, "epochs": 10}, "rounds": 2}
    fed = toy.federation(entry(), **options)
    progress = toy.run(fed, 2)
    weights = torch.tensor(fed.artefacts()["knowledge"]["weights"])
    assert weights[:2, 2:].max() < 1e-3
    assert weights[2:, :2].max() < 1e-3
    row = progress.rounds[-1]
    assert 0 < row["self_weight"] <= 1 <= row["neighbours"] <= 2.001


def own_loss(fed, client):
    """Loss of the model that a client holds, on its own training examples."""
    state = from_record(fed.grid.context(client + 1).state["KnFu.model"])
    model, data = fed.env.model, fed.env.data
    rows = torch.from_numpy(data.train[client].copy())
    flat = model.layout.flatten({n: t for n, t in state.items() if n != "$round"})
    outputs = model.outputs(flat, {}, data.fields["x"][rows])
    return float(torch.nn.functional.cross_entropy(outputs, data.fields["y"][rows]))


def test_without_sharpness_everybody_is_given_the_consensus_of_fedmd():
    said = {n + 1: {"knowledge": k} for n, k in enumerate(knowledge())}
    fedmd = FedMD(space="prob")
    fedmd.round = 1
    fedmd.setting = toy.federation(entry("fedmd")).setting
    ours, _ = KnFu(beta=0.0).fused(said)
    theirs, _ = fedmd.fused(said)
    for node in said:
        one, other = (from_record(r[node])["knowledge"] for r in (ours, theirs))
        torch.testing.assert_close(one, other)


def test_the_consensus_serves_neither_of_two_groups_as_the_fusion_does():
    """Of examples of its own classes, what a client is given to learn, and what it then knows."""
    options = {"data": grouped(), "train": {"lr": 0.5, "epochs": 10}, "rounds": 1}
    public = torch.arange(toy.PUBLIC) % 3
    given, known = [], []
    for beta in (10.0, 0.0):  # 0: the consensus of FedMD, see above
        fed = toy.federation(entry(beta=beta), **options)
        toy.run(fed, 1)
        fused, _ = fed.strategy.fused(fed.strategy.heard)
        told = [from_record(fused[n])["knowledge"] for n in sorted(fused)]
        mine = [public < 2, public < 2, public == 2, public == 2]
        given.append([
            float(torch.nn.functional.nll_loss(t[m].log(), public[m]))
            for t, m in zip(told, mine, strict=True)
        ])  # fmt: skip
        known.append([own_loss(fed, c) for c in range(4)])
    for fusion, consensus in (given, known):
        assert all(2 * a < b for a, b in zip(fusion, consensus, strict=True)), (fusion, consensus)


def test_what_a_client_is_given_changes_no_other():
    """The third client's digestion is lost; all the others are as if nothing had happened."""

    class Lost(toy.Wrapped):
        def answer(self, message, reply):
            digesting = message.content.config_records["config"].get("steps") == "digest"
            if digesting and message.metadata.dst_node_id == 3:
                return []
            return [reply]

    whole, lossy = toy.federation(entry()), toy.federation(entry(), wrap=Lost)
    rows = [toy.run(fed, 1).rounds[-1] for fed in (whole, lossy)]
    assert not any(r["abandoned"] for r in rows)
    others = [c for c in range(7) if c != 2]
    assert [kept(whole, c) for c in others] == [kept(lossy, c) for c in others]


def test_the_estimates_are_near_the_label_distributions():
    data = grouped()
    fed = toy.federation(entry(), data=data, train={"lr": 0.5, "epochs": 10}, rounds=1)
    toy.run(fed, 1)
    found = torch.tensor(fed.artefacts()["knowledge"]["estimates"])
    assert (found[:2, 2] < 0.35).all()
    assert (found[2:, 2] > 0.8).all()
    true = toy.federation(entry(epd="label_hist"), data=data, rounds=1)
    toy.run(true, 1)
    told = torch.tensor(true.artefacts()["knowledge"]["estimates"])
    assert (told[2:, 2] == 1).all()


def kept(fed, client):
    """The bits of the model that a client holds."""
    grid = getattr(fed.grid, "inner", fed.grid)
    state = from_record(grid.context(client + 1).state["KnFu.model"])
    return toy.sha256(to_record({n: t for n, t in state.items() if n != "$round"}))


def test_local_training_is_knfu_without_fine_tuning():
    runs = [
        toy.federation(entry("knfu", digest_epochs=0), rounds=3),
        toy.federation(entry("local_only"), rounds=3),
    ]
    for fed in runs:
        toy.run(fed, 3)
    one, other = runs
    assert [kept(one, c) for c in range(7)] == [kept(other, c) for c in range(7)]
    assert not list((toy.run(other, 1)).arrays)


def test_one_client_learns_nothing_from_itself():
    fed = toy.federation(entry(), data=toy.federated(toy.SIZES[:1]), rounds=1)
    row = toy.run(fed, 1).rounds[-1]
    assert row["self_weight"] == 1
    assert row["digest_loss"] == pytest.approx(0, abs=1e-6)


def test_fusing_on_the_clients_gives_the_same_models_up_to_rounding():
    runs = [toy.federation(entry(fuse_where=where), rounds=2) for where in ("server", "client")]
    for fed in runs:
        toy.run(fed, 2)
    states = [from_record(fed.grid.context(1).state["KnFu.model"]) for fed in runs]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-5, atol=1e-6)


def architectures(data):
    """Three models with different numbers of parameters."""
    kinds = ("softmax", "mlp", "bn")
    return [FlatModel(toy.module(kind), criterion(data.criterion)) for kind in kinds]


@pytest.mark.parametrize("name", ["knfu", "fedmd", "selective_fd", "local_only", "feddf"])
def test_clients_of_different_architectures_learn_together(name):
    seen = []

    class Watched(toy.Wrapped):
        def answer(self, message, reply):
            if message.metadata.message_type.startswith("train"):
                seen.append((message.content, reply.content))
            return [reply]

    fed = toy.federation(entry(name), rounds=2)
    others = architectures(fed.env.data)[1:]
    env = replace(fed.env, models=tuple(others), assignment=(0, 1, 2))
    from fedsim.client_app import ProgramApp
    from fedsim.federation import Federation
    from fedsim.runner import build_strategy
    from fedsim.runtime.grid import LocalGrid

    grid = Watched(LocalGrid(ProgramApp(env), env.data.num_clients))
    experiment = toy.experiment(entry(name), 2)
    mixed = Federation(experiment, entry(name), build_strategy(entry(name)), toy.SEED, grid, env)
    progress = toy.run(mixed, 2)
    assert progress.rounds[-1]["admitted"] == 7
    assert 0 <= progress.rounds[-1]["accuracy"] <= 1
    assert "client_accuracy" in progress.rounds[-1]
    sizes = {m.layout.size for m in env.architectures}
    assert len(sizes) == 3
    if name == "feddf":
        return
    for _, said in seen:  # no parameter ever leaves a client
        for record in said.array_records.values():
            shapes = {n: tuple(a.shape) for n, a in record.items()}
            assert shapes.pop("knowledge") == (toy.PUBLIC, toy.CLASSES)
            assert shapes.pop("public") == (16,)
            assert shapes in ({}, {"votes": (toy.PUBLIC,)})


def test_a_strategy_that_sends_models_refuses_a_zoo():
    fed = toy.federation(entry("fedavg"))
    env = replace(fed.env, models=tuple(architectures(fed.env.data)[1:]))
    from fedsim.federation import Federation
    from fedsim.runner import build_strategy

    with pytest.raises(ConfigError, match=r"zoo\.models gives clients 3 architectures"):
        Federation(fed.experiment, entry("fedavg"), build_strategy(entry("fedavg")), 0,
                   fed.grid, env)  # fmt: skip


def test_public_labels_are_used_nowhere():
    """They are -1 already; with others nothing changes."""
    one = toy.run(toy.federation(entry(), rounds=2))
    data = toy.federated()
    data.fields["y"][torch.from_numpy(data.public.copy())] = 2
    assert toy.sha256(one.arrays) == toy.sha256(
        toy.run(toy.federation(entry(), data=data, rounds=2)).arrays
    )


def test_a_strategy_of_knowledge_needs_a_public_set():
    data = replace(toy.federated(), public=np.empty(0, np.int64))
    with pytest.raises(ConfigError, match=r"data\.public = 0 must be 1 or above: KnFu"):
        toy.federation(entry(), data=data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KnFu(beta=-1.0), "beta = -1"),
        (lambda: KnFu(distance="far"), "distance = 'far' must be one of kl"),
        (lambda: KnFu(digest_loss="mae_logit"), "digest_loss = 'mae_logit'"),
        (lambda: KnFu(fuse_where="here"), "fuse_where = 'here'"),
        (lambda: FedMD(alignment=-1), "alignment = -1"),
        (lambda: SelectiveFD(quantile=1.0), "quantile = 1.0"),
        (lambda: SelectiveFD(space="logit", digest_loss="mae_logit"), "space = 'logit'"),
    ],
)
def test_wrong_parameters_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
