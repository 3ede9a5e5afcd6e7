"""FedAvg in fluke, evaluation off.

python fluke_runner.py WORKLOAD THREADS
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from _protocol import Turns, quiet
from _workloads import WORKLOADS, examples, initial

# torchvision as the registry has it lacks its operators beside a PyTorch for CPUs, and then cannot
# be imported. fluke imports it and needs none of them.
_OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "ps_roi_align", "ps_roi_pool"),
    *("_ps_roi_align_backward", "_ps_roi_pool_backward", "roi_pool", "_roi_pool_backward"),
    *("deform_conv2d", "_deform_conv2d_backward"),
):
    _OPERATORS.define(f"{_name}(Tensor x) -> Tensor")


def main(name: str, threads: int) -> None:
    """Serve rounds on standard input and output."""
    quiet()
    from fluke import DDict, FlukeENV
    from fluke.algorithms.fedavg import FedAVG
    from fluke.client import Client
    from fluke.config import OptimizerConfigurator
    from fluke.data import FastDataLoader
    from fluke.server import EarlyStopping, Server
    from fluke.utils import ServerObserver

    torch.set_num_threads(threads)
    workload = WORKLOADS[name]
    x, y, owned, _ = examples(workload)
    environment = FlukeENV()
    environment.set_seed(0)
    environment.set_device("cpu")
    environment.set_inmemory(True)
    environment.set_eval_cfg(
        task="classification", locals=False, pre_fit=False, post_fit=False, server=False
    )

    class Scaling(Client):
        """No training: a client scales the array it received."""

        def fit(self, override_local_epochs: int = 0) -> float:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(1.0001)
            return 0.0

    optimizer = OptimizerConfigurator(DDict(name="SGD", lr=workload.lr))
    clients = [
        (Client if workload.train else Scaling)(
            index=k,
            train_set=FastDataLoader(
                x[rows], y[rows], num_labels=10, batch_size=10, shuffle=True, skip_singleton=False
            ),
            test_set=None,
            optimizer_cfg=optimizer,
            loss_fn=torch.nn.CrossEntropyLoss(),
            local_epochs=1,
            persistency=False,
        )
        for k, rows in enumerate(torch.from_numpy(owned))
    ]
    server = Server(model=initial(workload), test_set=None, clients=clients, weighted=True)
    algorithm = FedAVG(len(clients), None, DDict(), clients=clients, server=server)

    class Rounds(ServerObserver):
        """Ends the run when no more rounds are wanted."""

        turns = Turns()

        def end_round(self, round: int) -> None:
            if not self.turns.mark():
                raise EarlyStopping(round)

    rounds = Rounds()
    # `run` tells observers of the federation, not of the server, that a round has ended.
    algorithm.notify = lambda event, **facts: (
        rounds.end_round(facts["round"]) if event == "end_round" else None
    )
    algorithm.finalize = lambda: None
    algorithm.run(10**9, workload.cohort / workload.clients)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
