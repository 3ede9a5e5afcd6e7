"""A federation so small that a round takes some milliseconds, and grids that misbehave.

It needs neither a dataset nor a model of the package: seven clients, four features, three classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import nn

from fedsim.client_app import ProgramApp
from fedsim.config import Experiment, StrategyConfig
from fedsim.core import rng
from fedsim.core.criteria import criterion
from fedsim.core.model import FlatModel
from fedsim.core.records import from_record
from fedsim.core.strategy import Strategy, route
from fedsim.data import FederatedData, Ragged
from fedsim.federation import Federation, Progress
from fedsim.models.lora import adapt
from fedsim.models.pruning import gated
from fedsim.runner import build_strategy
from fedsim.runtime.grid import LocalGrid, View
from fedsim.runtime.work import Environment, client_of, program_class

SIZES = (6, 10, 12, 7, 8, 11, 14)
"""Training examples of the clients; in batches of four none has one left, for BatchNorm's sake."""
EQUAL = (8,) * 7
FEATURES, CLASSES, HELD_OUT, CENTRAL, PUBLIC = 4, 3, 3, 30, 12
SEED = 11


def federated(
    sizes: Sequence[int] = SIZES, *, identical: bool = False, dtype: torch.dtype = torch.float32
) -> FederatedData:
    """Three Gaussian classes; every client has its own shift and its own favourite class.

    Args:
        sizes: training examples of each client.
        identical: all clients have the examples of the first.
        dtype: of the inputs.
    """
    draw = rng.stream(SEED, 0, rng.SERVER, "toy")
    centres = draw.normal(size=(CLASSES, FEATURES)) * 2
    xs, ys, train, test = [], [], [], []
    first = 0
    for client, size in enumerate(sizes):
        count = size + HELD_OUT
        weights = np.where(np.arange(CLASSES) == client % CLASSES, 4.0, 1.0)
        y = draw.choice(CLASSES, count, p=weights / weights.sum())
        xs.append(centres[y] + draw.normal(size=(count, FEATURES)) + 0.5 * draw.normal())
        ys.append(y)
        train.append(np.arange(first, first + size))
        test.append(np.arange(first + size, first + count))
        first += count
    y = draw.choice(CLASSES, CENTRAL)
    xs.append(centres[y] + draw.normal(size=(CENTRAL, FEATURES)))
    ys.append(y)
    y = draw.choice(CLASSES, PUBLIC)
    xs.append(centres[y] + draw.normal(size=(PUBLIC, FEATURES)))
    ys.append(np.full(PUBLIC, -1))  # nobody may look at them
    fields = {
        "x": torch.from_numpy(np.concatenate(xs)).to(dtype),
        "y": torch.from_numpy(np.concatenate(ys)),
    }
    return FederatedData(
        name="toy",
        fields=fields,
        train=Ragged.from_lists([train[0]] * len(sizes) if identical else train),
        test=Ragged.from_lists(test),
        central_test=np.arange(first, first + CENTRAL),
        criterion="cross_entropy",
        num_outputs=CLASSES,
        input_shape=(FEATURES,),
        client_names=tuple(map(str, range(len(sizes)))),
        heldout_clients=np.empty(0, np.int64),
        groups=None,
        fingerprint="toy",
        meta={},
        public=np.arange(first + CENTRAL, first + CENTRAL + PUBLIC),
    )


def module(kind: str = "softmax", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A seeded model: ``"softmax"`` regression, an ``"mlp"``, one with BatchNorm,
    ``"bn"``, or the ``"mlp"`` with low-rank updates, ``"lora"``, that may be merged into its
    base, ``"lora_delta"``.

    A ``"line"`` through the origin has one input, one output, and slope 1/2.
    """
    if kind == "line":
        made = nn.Linear(1, 1, bias=False)
        nn.init.constant_(made.weight, 0.5)
        return made.to(dtype)
    with rng.isolated(SEED):
        made = {
            "softmax": lambda: nn.Linear(FEATURES, CLASSES),
            "mlp": lambda: nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)),
            "lora": lambda: adapt(
                nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)), 2, 2.0
            ),
            "lora_delta": lambda: adapt(
                nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)),
                2,
                2.0,
                delta=True,
            ),
            "prunable": lambda: gated(
                adapt(
                    nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)), 2, 2.0
                )
            ),
            "bn": lambda: nn.Sequential(
                nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, CLASSES)
            ),
        }[kind]()
    return made.to(dtype)


def environment(
    clients: Iterable[str] = ("fedavg",),
    *,
    model: str = "softmax",
    data: FederatedData | None = None,
) -> Environment:
    """Toy data and a resident toy model, with these client halves."""
    data = data or federated()
    resident = FlatModel(module(model, data.fields["x"].dtype), criterion(data.criterion))
    return Environment(data, resident, {route(c): program_class(c) for c in clients}, 1024)


def experiment(strategy: StrategyConfig, rounds: int = 3, **sections: dict[str, Any]) -> Experiment:
    """An experiment around the toy; dataset and model are named but never loaded."""
    return Experiment.model_validate(
        {
            "experiment": {"name": "toy", "rounds": rounds, "seeds": [SEED]},
            "data": {"dataset": "digits"},
            "model": "logistic",
            "strategy": [strategy],
            **sections,
            "train": {"lr": 0.1, "batch_size": 4, **sections.get("train", {})},
        }
    )


def federation(
    entry: StrategyConfig,
    *,
    rounds: int = 3,
    model: str = "softmax",
    data: FederatedData | None = None,
    strategy: Strategy | None = None,
    wrap: Callable[[LocalGrid], Grid] = lambda grid: grid,
    **sections: dict[str, Any],
) -> Federation:
    """A federation that is ready to run.

    Args:
        entry: the strategy's configuration.
        rounds: rounds planned.
        model: kind of toy model.
        data: other data than `federated()`.
        strategy: use this one instead of what `entry` says.
        wrap: puts another grid in front of the local one.
        sections: sections of the experiment.
    """
    env = environment([client_of(entry.name, entry.client)], model=model, data=data)
    grid = wrap(LocalGrid(ProgramApp(env), env.data.num_clients))
    return Federation(
        experiment(entry, rounds, **sections),
        entry,
        strategy or build_strategy(entry),
        SEED,
        grid,
        env,
    )


def run(federation: Federation, rounds: int | None = None) -> Progress:
    """All rounds from the start."""
    progress = federation.begin()
    for _ in range(rounds or federation.setting.rounds):
        federation.advance(progress)
    return progress


def sha256(record: ArrayRecord) -> str:
    """Digest of names, shapes, dtypes and bits."""
    total = hashlib.sha256()
    for name, tensor in sorted(from_record(record).items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def close(a: ArrayRecord, b: ArrayRecord, tolerance: float) -> bool:
    """Whether two models agree: to the bit if the tolerance is 0, else relative to the largest."""
    if tolerance == 0:
        return sha256(a) == sha256(b)
    left, right = from_record(a), from_record(b)
    return list(left) == list(right) and all(
        float((x.double() - right[n].double()).abs().max())
        <= tolerance * max(1.0, float(right[n].double().abs().max()))
        for n, x in left.items()
    )


class Wrapped(View):
    """A grid in front of another, to be misused: it returns a list, in any order it likes."""

    def __init__(self, inner: LocalGrid) -> None:
        super().__init__(inner, list(inner.get_node_ids()))
        self.inner = inner

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """What `answer` makes of every message and its reply."""
        sent = list(messages)
        replies = [next(iter(self.inner.send_and_receive([m]))) for m in sent]
        pairs = zip(sent, replies, strict=True)
        return [r for message, reply in pairs for r in self.answer(message, reply)]

    def answer(self, message: Message, reply: Message) -> list[Message]:
        """What arrives instead of the reply."""
        return [reply]


class Shuffled(Wrapped):
    """Clients work and answer in random order."""

    def __init__(self, inner: LocalGrid, seed: int) -> None:
        super().__init__(inner)
        self._draw = rng.stream(seed, 0, rng.SERVER, "shuffle")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies in random order."""
        sent = list(messages)
        shuffled = [sent[i] for i in self._draw.permutation(len(sent))]
        replies = list(super().send_and_receive(shuffled))
        return [replies[i] for i in self._draw.permutation(len(replies))]


class Unreliable(Wrapped):
    """In some rounds, some nodes answer otherwise.

    Args:
        inner: the grid in front of which it stands.
        nodes: who misbehaves.
        answer: ``answer(message, reply)`` gives what arrives instead.
        rounds: in which rounds; None: in all.
    """

    def __init__(
        self,
        inner: LocalGrid,
        nodes: Iterable[int],
        answer: Callable[[Message, Message], list[Message]],
        rounds: Iterable[int] | None = None,
    ) -> None:
        super().__init__(inner)
        self._bad, self._answer = set(nodes), answer
        self._rounds = None if rounds is None else set(rounds)
        self._heard: set[object] = set()

    def answer(self, message: Message, reply: Message) -> list[Message]:
        """The misbehaviour, in training messages only."""
        config = message.content.config_records["config"]
        training = message.metadata.message_type.startswith("train")
        due = self._rounds is None or config["server-round"] in self._rounds
        here = (config["server-round"], message.metadata.dst_node_id)
        training &= here not in self._heard  # later phases of a round are left alone
        self._heard.add(here)
        if training and due and message.metadata.dst_node_id in self._bad:
            return self._answer(message, reply)
        return [reply]


def messages_of(fed: Federation, arrays: ArrayRecord, server_round: int) -> list[Message]:
    """The messages of a round, in order of node."""
    view = View(fed.grid, fed.trainers)
    told = ConfigRecord(dict(fed.told(server_round)))
    messages = fed.strategy.configure_train(server_round, arrays, told, view)
    return sorted(messages, key=lambda m: m.metadata.dst_node_id)


def contents_of(fed: Federation, messages: Iterable[Message]) -> list[RecordDict]:
    """The contents of the clients' replies, in the order of the messages."""
    return [reply.content for reply in fed.grid.send_and_receive(messages)]
