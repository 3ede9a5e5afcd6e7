"""FedAvg in pfl: one process, or two that share the cohort.

python pfl_runner.py WORKLOAD THREADS PROCESSES
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from _protocol import SEED, Turns, quiet
from _workloads import WORKLOADS, examples, initial


def spread(processes: int) -> bool:
    """Start the other processes of the group; whether this one is the first."""
    if processes == 1 or "RANK" in os.environ:
        return int(os.environ.get("RANK", 0)) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        "TORCHELASTIC_RUN_ID": "bench",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    os.environ.update(group)
    for rank in range(1, processes):
        own = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        subprocess.Popen([sys.executable, *sys.argv], env=own, stdin=subprocess.DEVNULL)
    os.environ.update(RANK="0", LOCAL_RANK="0")
    return True


def main(name: str, threads: int, processes: int) -> None:
    """Serve rounds on standard input and output."""
    first = spread(processes)
    quiet()
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    torch.set_num_threads(threads)
    torch.default_generator.manual_seed(SEED)
    workload = WORKLOADS[name]
    x, y, owned, _ = examples(workload)
    module = initial(workload)
    loss = torch.nn.functional.cross_entropy
    module.loss = lambda x, y: loss(module(x), y)  # type: ignore[assignment]
    module.metrics = lambda x, y: {"loss": loss(module(x), y).item()}  # type: ignore[assignment]

    class Scaling(FederatedAveraging):
        """No training: a client scales the array it received."""

        def train_one_user(self, initial_model_state, model, user_dataset, central_context):
            with torch.no_grad():
                for parameter in model.pytorch_model.parameters():
                    parameter.mul_(1.0001)
            return model.get_model_difference(initial_model_state), Metrics()

    class Rounds(TrainingProcessCallback):
        """Times the iterations; the first process reads how many there are to be."""

        turns = Turns() if first else None

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            more = self.turns.mark() if self.turns else True
            if processes > 1:
                go = torch.tensor([int(more)])
                torch.distributed.broadcast(go, 0)
                more = bool(go)
            return not more, Metrics()

    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), 1.0))
    users = {k: [x[rows], y[rows]] for k, rows in enumerate(torch.from_numpy(owned))}
    sampler = get_user_sampler("random", list(users))
    data = FederatedDataset.from_slices(users, sampler)
    algorithm = FederatedAveraging() if workload.train else Scaling()
    algorithm.run(
        NNAlgorithmParams(10**9, 10**9, workload.cohort, None),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(10, 1, workload.lr),
        None,
        [Rounds()],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
