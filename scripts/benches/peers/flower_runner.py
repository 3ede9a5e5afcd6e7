"""FedAvg in Flower's simulation: message API, Ray engine, one core for each client.

python flower_runner.py WORKLOAD WORKERS
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from _protocol import Turns, quiet
from _workloads import WORKLOADS, examples, initial
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()


@lru_cache
def prepared(name: str):
    """Data and model, once in each process."""
    torch.set_num_threads(1)
    workload = WORKLOADS[name]
    x, y, owned, _ = examples(workload)
    return workload, x, y, owned, initial(workload)


@client.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    name = str(message.content["config"]["workload"])
    workload, x, y, owned, model = prepared(name)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    if workload.train:
        optimizer = torch.optim.SGD(model.parameters(), workload.lr)
        mine = torch.from_numpy(owned[int(context.node_config["partition-id"])])
        for rows in mine[torch.randperm(len(mine))].split(10):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0001)
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": workload.examples}),
        }
    )
    return Message(content, reply_to=message)


def main(name: str, workers: int) -> None:
    """Serve rounds on standard input and output."""
    quiet()
    from flwr.simulation import run_simulation

    workload, turns = WORKLOADS[name], Turns()
    app = ServerApp()

    class Timed(FedAvg):
        """Says when a round has been aggregated."""

        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            if any(reply.has_error() for reply in replies) or len(replies) < workload.cohort:
                os._exit(1)  # a round that failed is no measurement
            found = super().aggregate_train(server_round, replies)
            if not turns.mark():
                os._exit(0)  # Ray's processes go with this one
            return found

    @app.main()
    def server(grid: Grid, context: Context) -> None:
        strategy = Timed(
            fraction_train=workload.cohort / workload.clients,
            fraction_evaluate=0.0,
            min_train_nodes=workload.cohort,
            min_available_nodes=workload.clients,
        )
        strategy.start(
            grid,
            ArrayRecord(initial(workload).state_dict()),
            num_rounds=10**9,
            train_config=ConfigRecord({"workload": name}),
        )

    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(
        app,
        client,
        workload.clients,
        backend_config={
            "client_resources": resources,
            "init_args": {"num_cpus": workers, "include_dashboard": False},
        },
    )


if __name__ == "__main__":
    # By its name, under which Ray's workers find what is in it.
    from flower_runner import main as named

    named(sys.argv[1], int(sys.argv[2]))
