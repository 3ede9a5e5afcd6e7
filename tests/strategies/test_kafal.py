"""KAFAL by its golden numbers, and what holds of pools, budgets and messages whatever the rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord

from clients.kafal import KAFAL as Client
from clients.kafal import Compensated, compensation, prior_shift
from fedsim.config import StrategyConfig
from fedsim.core.criteria import criterion
from fedsim.core.distill import divergence
from fedsim.core.errors import ConfigError
from fedsim.core.pool import Pool, share
from fedsim.core.records import from_record
from fedsim.core.selection import RULES
from strategies.active_learning import ActiveLearning
from strategies.kafal import KAFAL
from tests.contract import toy


def entry(name="kafal", **params):
    given = {"initial": 0.5, "budget": 0.2, "rounds_per_cycle": 1}
    given |= {"participation": 1.0} if name == "kafal" else {}
    return StrategyConfig(name=name, params={**given, **params})


# ---------------------------------------------------------------------------- KCFU


def test_golden_shifted_cross_entropy():
    z, n = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64), torch.tensor([6.0, 3, 1])
    program = Compensated(shift=prior_shift(n.double()))
    found = [
        float(program.loss(criterion("cross_entropy"), z, torch.tensor([y]), None))
        for y in range(3)
    ]
    np.testing.assert_allclose(found, [0.9002545804, 0.5934017609, 3.1920140495], atol=1e-10)
    assert prior_shift(torch.tensor([4.0, 4, 4])).tolist() == [0, 0, 0]


def test_absent_classes_get_no_gradient():
    z = torch.tensor([[1.0, 2.0, 0.5]], requires_grad=True)
    program = Compensated(shift=prior_shift(torch.tensor([6.0, 3, 0])))
    program.loss(criterion("cross_entropy"), z, torch.tensor([1]), None).backward()
    assert z.grad.isfinite().all()
    assert z.grad[0, 2] == 0


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((6.0, 3, 1), (1 / 9, 2 / 9, 2 / 3)), ((6.0, 0, 2), (0.25, 0, 0.75))],
)
def test_golden_compensation(counts, expected):
    found = compensation(torch.tensor(counts, dtype=torch.float64))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_distillation_is_averaged_over_classes_and_vanishes_for_the_teacher_itself():
    z = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    weight = torch.tensor([0.5, 2.0])
    program = Compensated(strength=1.0)
    same = program.loss(criterion("cross_entropy"), z, z.softmax(-1), weight)
    assert float(same) == pytest.approx(0, abs=1e-7)
    target = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]])
    ours = program.loss(criterion("cross_entropy"), z, target, weight)
    each = F.kl_div(z.log_softmax(-1), target, reduction="none").mean(1)
    torch.testing.assert_close(ours, (weight * each).mean())
    torch.testing.assert_close(divergence(target, z), 3 * divergence(target, z, over_classes=True))


# ---------------------------------------------------------------------------- pools and budgets

SIZES = (5021, 4556, 5008, 5014, 5565, 5826, 5177, 5186, 4522, 4125)


def test_golden_label_totals_of_the_official_split():
    totals = [sum(share(0.1, n) for n in SIZES) + a * sum(share(0.05, n) for n in SIZES)
              for a in range(6)]  # fmt: skip
    assert totals == [5005, 7511, 10017, 12523, 15029, 17535]


class Counting:
    """Labels everything, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def label(self, items):
        self.asked.append((items.client, tuple(items.names)))
        return dict(enumerate(items.held.tolist()))


def run(name="kafal", rounds=4, oracle=None, data=None, **params):
    fed = toy.federation(entry(name, **params), rounds=rounds, data=data)
    if oracle is not None:
        object.__setattr__(fed.env, "oracle", oracle)
    return fed, toy.run(fed, rounds)


def pools(fed):
    """The pool of every client, as it kept it."""
    found = []
    for client, rows in enumerate(fed.env.data.train[c] for c in range(fed.env.data.num_clients)):
        state = from_record(fed.grid.context(client + 1).state["KAFAL.pool"])
        state.pop("$round")
        found.append(Pool(torch.from_numpy(rows.copy()), toy.CLASSES, **state))
    return found


@pytest.mark.parametrize("rule", RULES)
def test_pools_stay_whole_and_budgets_are_kept(rule):
    oracle = Counting()
    fed, progress = run("active_learning", rule=rule, oracle=oracle)
    for size, pool in zip(toy.SIZES, pools(fed), strict=True):
        first, more = math.ceil(size * 0.5), math.ceil(size * 0.2)
        wanted = [first, more, more, more]
        spent = [min(n, max(0, size - sum(wanted[:i]))) for i, n in enumerate(wanted)]
        assert [*pool.spent.tolist(), 0, 0][:4] == spent
        assert len(pool.labelled) == len(torch.unique(pool.labelled)) == pool.spent.sum()
        union = torch.cat([pool.labelled, pool.open]).sort().values
        assert union.tolist() == pool.rows.sort().values.tolist()
        held = fed.env.data.fields["y"][pool.labelled]
        assert pool.labels.tolist() == held.tolist()
        assert pool.counts.tolist() == torch.bincount(held, minlength=toy.CLASSES).tolist()
    for client in range(len(toy.SIZES)):
        names = [n for c, asked in oracle.asked if c == client for n in asked]
        assert len(names) == len(set(names))
    labels = [r["labels"] for r in progress.rounds[1:]]
    assert labels == sorted(labels)
    assert labels[-1] == sum(len(p.labelled) for p in pools(fed))


def test_labels_that_were_not_bought_cannot_be_reached():
    """With the labels of everything unlabelled poisoned, nothing changes."""

    class Remembering:
        def __init__(self, y):
            self.y, self.bought = y, {}

        def label(self, items):
            return {i: self.y[items.names[i]] for i in range(len(items))}

    from fedsim.runtime.oracles import name_of

    data = toy.federated()
    x, y = data.fields["x"], data.fields["y"]
    truth = {name_of(x[i]): int(y[i]) for i in range(len(y))}
    _, honest = run(rule="badge", oracle=Remembering(truth), data=toy.federated())
    mine = np.concatenate([data.train[c] for c in range(data.num_clients)])
    data.fields["y"][torch.from_numpy(mine)] = -1
    _, poisoned = run(rule="badge", oracle=Remembering(truth), data=data)
    assert toy.sha256(honest.arrays) == toy.sha256(poisoned.arrays)


def test_the_server_sees_models_and_a_few_numbers_only():
    """No record of the size of a pool or of the classes, no index, no label, no histogram."""
    seen = []

    class Watched(toy.Wrapped):
        def answer(self, message, reply):
            config = message.content.config_records["config"]
            if message.metadata.message_type.startswith("train"):
                seen.append((config["phase"], message.content, reply.content))
            return [reply]

    fed = toy.federation(entry(), rounds=3, wrap=Watched)
    toy.run(fed, 3)
    numbers = {"num-examples", "asked", "waiting", "steps", "loss", "distillation"}
    numbers |= {"acquired", "score_mean", "score_max"}
    model = {n: tuple(t.shape) for n, t in from_record(fed.env.model.initial()).items()}
    assert {phase for phase, _, _ in seen} == {"train", "acquire"}
    for phase, _, said in seen:
        assert set(said) == ({"arrays", "metrics"} if phase == "train" else {"metrics"})
        assert set(said.metric_records["metrics"]) <= numbers
        assert all(isinstance(v, (int, float)) for v in said.metric_records["metrics"].values())
        for record in said.array_records.values():
            assert isinstance(record, ArrayRecord)
            assert {n: tuple(a.shape) for n, a in record.items()} == model


def test_selection_can_be_repeated_and_does_not_depend_on_the_size_of_batches():
    chosen = []
    for size in (1024, 3):
        fed = toy.federation(entry(), rounds=3)
        object.__setattr__(fed.env, "batch_size", size)
        toy.run(fed, 3)
        chosen.append([p.labelled.tolist() for p in pools(fed)])
    assert chosen[0] == chosen[1]


def test_a_cold_start_forgets_everything_but_the_pools():
    """With nothing more labelled, every cycle gives the same model."""
    fed = toy.federation(entry(budget=0.0, rounds_per_cycle=2), rounds=4, train={"momentum": 0.5})
    progress = fed.begin()
    ends = []
    for _ in range(4):
        fed.advance(progress)
        ends.append(progress.rounds[-1]["labels"])
    assert len(set(ends)) == 1
    again = toy.federation(
        entry(budget=0.0, rounds_per_cycle=2, warm_start=True), rounds=4, train={"momentum": 0.5}
    )
    assert toy.sha256(toy.run(again, 2).arrays) == toy.sha256(
        toy.run(toy.federation(entry(budget=0.0, rounds_per_cycle=2), rounds=4,
                               train={"momentum": 0.5}), 2).arrays)  # fmt: skip
    assert toy.sha256(toy.run(again, 4).arrays) != toy.sha256(progress.arrays)


@pytest.mark.parametrize(("share", "mixed"), [(1.0, False), (0.5, True)])
def test_a_coefficient_of_one_mixes_nothing(share, mixed):
    """An example mixed with weight 1 is itself, and weighs as the class that is seen in it."""
    inputs = torch.arange(24.0).view(8, 3)
    counts = torch.tensor([6.0, 3, 1], dtype=torch.float64)

    class Draw:
        permutation = staticmethod(np.random.default_rng(0).permutation)
        beta = staticmethod(lambda a, b, n: np.full(n, share))

    class State:
        kept = staticmethod(lambda name: None)
        stream = staticmethod(lambda purpose: Draw)
        inputs = staticmethod(lambda rows: inputs[rows])
        outputs = staticmethod(lambda model, x, training: (x - 9) * torch.tensor([1.0, 0, -1]))

    class Unlabelled:
        unlabelled = torch.arange(8)

    Unlabelled.counts = counts
    x, target, weight = next(Client(batch_size=8)._mixed(State, Unlabelled, None))
    found = {tuple(row) for row in x.tolist()} == {tuple(row) for row in inputs.tolist()}
    assert found != mixed
    if not mixed:
        torch.testing.assert_close(weight, compensation(counts).float()[target.argmax(1)])


def test_there_is_no_distillation_in_the_first_round_of_a_cycle():
    _, progress = run(rounds_per_cycle=2, rounds=4)
    assert [r["distillation"] > 0 for r in progress.rounds[1:]] == [False, True, False, True]


@pytest.mark.parametrize("model", ["softmax", "bn"])
def test_the_teacher_stays_as_it_was(model):
    """Its batch statistics too."""
    fed = toy.federation(entry(rounds_per_cycle=4), rounds=4, model=model)
    progress = toy.run(fed, 3)
    assert progress.rounds[-1]["distillation"] > 0
    before = toy.sha256(progress.arrays)
    fed.advance(progress)
    sent = from_record(fed.grid.context(1).state["KAFAL.global"])
    sent.pop("$round")
    from fedsim.core.records import to_record

    assert toy.sha256(to_record(sent)) == before


def test_kcfu_with_even_classes_and_without_distillation_is_fedavg():
    data = toy.federated((9,) * 7)
    y = torch.arange(len(data.fields["y"])) % toy.CLASSES
    for client in range(data.num_clients):
        data.fields["y"][torch.from_numpy(data.train[client].copy())] = y[:9]
    options = {"data": data, "rounds": 3}
    ours = toy.run(toy.federation(entry(initial=1.0, strength=0.0, rounds_per_cycle=5), **options))
    theirs = toy.run(toy.federation(StrategyConfig(name="fedavg"), **options))
    assert toy.sha256(ours.arrays) == toy.sha256(theirs.arrays)


def test_participation_and_the_last_round_of_a_cycle():
    fed = toy.federation(entry(participation=0.5, rounds_per_cycle=2), rounds=4)
    progress = toy.run(fed, 4)
    assert [r["sampled"] for r in progress.rounds[1:]] == [4, 7, 4, 7]
    fed = toy.federation(
        entry(participation=0.5, rounds_per_cycle=2, final_round_full=False, fresh_global=False),
        rounds=4,
    )
    progress = toy.run(fed, 4)
    trained = [
        sum(1 for r in progress.clients if r["round"] == n and "loss" in r) for n in (1, 2, 3, 4)
    ]
    assert trained == [4, 4, 4, 4]
    assert progress.rounds[2]["acquired"] > 0
    for size, pool in zip(toy.SIZES, pools(fed), strict=True):
        assert len(pool.labelled) > math.ceil(size * 0.5)


def test_learning_rate_drops_at_the_milestone():
    ends = [
        toy.sha256(run(rounds_per_cycle=3, milestone=milestone, rounds=rounds)[1].arrays)
        for rounds in (1, 2)
        for milestone in (2, 0)
    ]
    assert ends[0] == ends[1]
    assert ends[2] != ends[3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActiveLearning(rule="guess"), "rule = 'guess' must be one of random"),
        (lambda: ActiveLearning(budget=1.5), "budget = 1.5"),
        (lambda: ActiveLearning(initial=0.0), "initial = 0.0"),
        (lambda: ActiveLearning(participation=0.0), "participation = 0.0"),
        (lambda: KAFAL(mix="none"), "mix = 'none'"),
        (lambda: KAFAL(teacher="test"), "teacher = 'test'"),
        (lambda: KAFAL(unlabelled="some"), "unlabelled = 'some'"),
    ],
)
def test_wrong_parameters_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
