"""The workloads of the engine bench, and one runner of one of them as a process of its own.

    python _workloads.py WORKLOAD RUNNER

See `_protocol` for what it prints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _protocol import SEED, draw, serve
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """Clients, cohort, data of each client, and local work.

    Attributes:
        clients: population.
        cohort: clients of a round.
        examples: of each client.
        lr: of local SGD, one epoch of minibatches of 10.
        module: makes the model.
        shape: of one example.
        train: whether clients train; if not, they scale what they received.
    """

    clients: int
    cohort: int
    examples: int
    lr: float
    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    train: bool = True


def mlp() -> nn.Module:
    """MLP 784-64-10: 50,890 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn_small() -> nn.Module:
    """conv32-pool-conv64-pool-fc64: 167,562 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64 * 36, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def cnn() -> nn.Module:
    """The simple CNN of pfl without dropout: 1,626,442 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def tensor() -> nn.Module:
    """One tensor of 10 MB."""
    return nn.Linear(2500, 1000, bias=False)


WORKLOADS = {
    "small": Workload(1000, 100, 20, 0.1, mlp, (1, 28, 28)),
    "cnn_small": Workload(100, 10, 50, 0.05, cnn_small, (3, 32, 32)),
    "cnn": Workload(100, 10, 50, 0.05, cnn, (3, 32, 32)),
    "overhead": Workload(100, 100, 1, 0.1, tensor, (2500,), train=False),
}


def examples(workload: Workload) -> tuple[Tensor, Tensor, np.ndarray, str]:
    """Inputs, labels, the examples of each client [clients, n], and where they are from."""
    x, y, owned, source = draw(workload.clients, workload.examples, workload.shape)
    return torch.from_numpy(x), torch.from_numpy(y), owned, source


def initial(workload: Workload) -> nn.Module:
    """The seeded model."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(SEED)
    made = workload.module()
    torch.default_generator.set_state(before)
    return made


# ---------------------------------------------------------------------------- plain


def plain(workload: Workload, threads: int) -> Callable[[], None]:
    """Sequential FedAvg in PyTorch by hand: one process, one resident model."""
    torch.set_num_threads(threads)
    x, y, owned, _ = examples(workload)
    server, client = initial(workload), initial(workload)
    optimizer = torch.optim.SGD(client.parameters(), workload.lr)
    draw = np.random.Generator(np.random.Philox(key=SEED + 1))
    share = 1.0 / workload.cohort

    def train(k: int) -> None:
        order = torch.from_numpy(draw.permutation(owned[k]))
        for rows in order.split(10):
            optimizer.zero_grad()
            F.cross_entropy(client(x[rows]), y[rows]).backward()
            optimizer.step()

    def one_round() -> None:
        total = [torch.zeros_like(p) for p in server.parameters()]
        for k in draw.choice(workload.clients, workload.cohort, replace=False):
            with torch.no_grad():
                for mine, theirs in zip(client.parameters(), server.parameters(), strict=True):
                    mine.copy_(theirs)
            if workload.train:
                train(k)
            with torch.no_grad():
                for sums, mine in zip(total, client.parameters(), strict=True):
                    if not workload.train:
                        mine.mul_(1.0001)
                    sums.add_(mine, alpha=share)
        with torch.no_grad():
            for mine, mean in zip(server.parameters(), total, strict=True):
                mine.copy_(mean)

    return one_round


def arrays(workload: Workload, threads: int) -> Callable[[], None]:
    """Nothing but the sum of a cohort's arrays, which are there already."""
    torch.set_num_threads(threads)
    size = sum(p.numel() for p in initial(workload).parameters())
    given = [torch.full((size,), float(i)) for i in range(4)]
    total = torch.zeros(size)

    def one_round() -> None:
        total.zero_()
        for k in range(workload.cohort):
            total.add_(given[k % 4], alpha=1.0 / workload.cohort)

    return one_round


# ---------------------------------------------------------------------------- fedsim


def fedsim(workload: Workload, executor: str, workers: int) -> Callable[[], None]:
    """A whole round of fedsim: sampling, messages, gate, sums and the clients' rows."""
    from fedsim.client_app import ProgramApp
    from fedsim.config import Experiment
    from fedsim.core.criteria import criterion
    from fedsim.core.model import FlatModel
    from fedsim.core.program import Batch, LocalProgram, LocalState
    from fedsim.data import FederatedData, Ragged
    from fedsim.federation import Federation
    from fedsim.runner import build_strategy
    from fedsim.runtime.engine import Engine
    from fedsim.runtime.grid import LocalGrid
    from fedsim.runtime.work import Environment, program_class

    class Scale(LocalProgram):
        """No training: a client scales the array it received."""

        def step(self, s: LocalState, batch: Batch) -> None:
            s.w.mul_(1.0001)

    torch.set_num_threads(1)
    x, y, owned, _ = examples(workload)
    train = Ragged.from_lists(list(owned))
    none = np.empty(0, np.int64)
    data = FederatedData(
        name="bench",
        fields={"x": x, "y": y},
        train=train,
        test=Ragged.from_lists([none] * workload.clients),
        central_test=none,
        criterion="cross_entropy",
        num_outputs=10,
        input_shape=workload.shape,
        client_names=tuple(map(str, range(workload.clients))),
        heldout_clients=none,
        groups=None,
        fingerprint="bench",
        meta={},
    )
    model = FlatModel(initial(workload), criterion("cross_entropy"))
    half: Any = program_class("fedavg") if workload.train else Scale
    env = Environment(data, model, {"fedavg": half}, 1024)
    experiment = Experiment.model_validate(
        {
            "experiment": {"name": "bench", "rounds": 10**6, "seeds": [SEED]},
            "data": {"dataset": "mnist5k"},
            "model": "mlp",
            "cohort": {"size": workload.cohort},
            "train": {"lr": workload.lr, "batch_size": 10},
            "evaluate": {"central": False, "clients": True},
            "runtime": {"executor": executor, "workers": workers},
            "strategy": [{"name": "fedavg"}],
        }
    )
    app = ProgramApp(env)
    entry = experiment.strategy[0]
    grid = LocalGrid(app, workload.clients)
    federation = Federation(experiment, entry, build_strategy(entry), SEED, grid, env)
    choice = federation.choice()
    print(f"fedsim runs {choice}", file=sys.stderr)
    app.engine = Engine(model, data, choice, workers)
    progress = federation.begin()

    def one_round() -> None:
        federation.advance(progress)
        if progress.rounds[-1]["admitted"] != workload.cohort:
            raise RuntimeError(f"a round was not whole: {progress.rounds[-1]}")
        progress.clients.clear()

    return one_round


RUNNERS: dict[str, Callable[[Workload], Callable[[], None]]] = {
    "fedsim": partial(fedsim, executor="auto", workers=2),
    "fedsim-serial": partial(fedsim, executor="serial", workers=1),
    "plain-t1": partial(plain, threads=1),
    "plain-t2": partial(plain, threads=2),
    "sum-t1": partial(arrays, threads=1),
    "sum-t2": partial(arrays, threads=2),
}


def main(workload: str, runner: str) -> None:
    """Serve rounds on standard input and output."""
    serve(RUNNERS[runner](WORKLOADS[workload]))


if __name__ == "__main__":
    main(*sys.argv[1:3])
