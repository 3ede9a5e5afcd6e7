"""FedAvg in BlazeFL: its own FedAvg classes, clients one after another or in a pool of threads.

python blazefl_runner.py WORKLOAD THREADS POOL
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from _protocol import SEED, quiet, serve
from _workloads import WORKLOADS, examples, initial
from torch.utils.data import DataLoader, TensorDataset


def main(name: str, threads: int, pool: int) -> None:
    """Serve rounds on standard input and output."""
    quiet()
    from blazefl.contrib.fedavg import (
        FedAvgBaseClientTrainer,
        FedAvgBaseServerHandler,
        FedAvgThreadPoolClientTrainer,
        FedAvgUplinkPackage,
    )
    from blazefl.core import deserialize_model, serialize_model

    torch.set_num_threads(threads)
    workload = WORKLOADS[name]
    x, y, owned, _ = examples(workload)

    class Models:
        """One model, whatever its name."""

        def select_model(self, model_name):
            return initial(workload)

    class Clients:
        """Loaders over tensors that are there already."""

        def __init__(self):
            self.sets = [TensorDataset(x[rows], y[rows]) for rows in torch.from_numpy(owned)]

        def get_dataloader(self, type_, cid, batch_size=None, generator=None):
            return DataLoader(self.sets[cid], batch_size or 10, shuffle=True, generator=generator)

        def set_dataset(self, *_):
            """Nothing to store."""

    def scaled(model, model_parameters, cid):
        deserialize_model(model, model_parameters)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0001)
        return FedAvgUplinkPackage(cid, serialize_model(model), workload.examples)

    class ScalingInTurn(FedAvgBaseClientTrainer):
        """No training: a client scales the array it received."""

        def train(self, model_parameters, train_loader, cid):
            return scaled(self.model, model_parameters, cid)

    data = Clients()
    server = FedAvgBaseServerHandler(
        model_selector=Models(),
        model_name="",
        dataset=data,
        global_round=10**9,
        num_clients=workload.clients,
        sample_ratio=workload.cohort / workload.clients,
        device="cpu",
        batch_size=10,
        seed=SEED,
    )
    same = {
        "model_selector": Models(),
        "model_name": "",
        "dataset": data,
        "device": "cpu",
        "num_clients": workload.clients,
        "epochs": 1,
        "batch_size": 10,
        "lr": workload.lr,
        "seed": SEED,
    }
    if pool == 1:
        kind = FedAvgBaseClientTrainer if workload.train else ScalingInTurn
        trainer = kind(**same)
    else:
        trainer = FedAvgThreadPoolClientTrainer(**same, num_parallels=pool)

    def one_round() -> None:
        chosen = server.sample_clients()
        trainer.local_process(server.downlink_package(), chosen)
        for package in trainer.uplink_package():
            server.load(package)

    serve(one_round)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
