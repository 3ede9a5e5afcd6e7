"""FedAvg in FedJAX: its algorithm as it comes, jit for each client, XLA's own threads.

python fedjax_runner.py WORKLOAD
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from _protocol import SEED, draw, quiet, serve

# As WORKLOADS of _workloads.py, which needs PyTorch: clients, cohort, examples, lr, shape.
WORKLOADS = {
    "small": (1000, 100, 20, 0.1, (1, 28, 28)),
    "cnn_small": (100, 10, 50, 0.05, (3, 32, 32)),
    "cnn": (100, 10, 50, 0.05, (3, 32, 32)),
}


def main(name: str) -> None:
    """Serve rounds on standard input and output."""
    quiet()
    import fedjax
    import haiku as hk
    import jax

    clients, cohort, count, lr, shape = WORKLOADS[name]
    x, y, owned, _ = draw(clients, count, shape)
    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    relu = jax.nn.relu

    def pool():
        return hk.MaxPool((1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def conv(channels: int):
        return hk.Conv2D(channels, 3, padding="VALID")

    layers = {
        "small": lambda: [hk.Flatten(), hk.Linear(64), relu, hk.Linear(10)],
        "cnn_small": lambda: [
            *(conv(32), relu, pool(), conv(64), relu, pool()),
            *(hk.Flatten(), hk.Linear(64), relu, hk.Linear(10)),
        ],
        "cnn": lambda: [
            *(conv(32), relu, conv(64), relu, pool()),
            *(hk.Flatten(), hk.Linear(128), relu, hk.Linear(10)),
        ],
    }[name]

    model = fedjax.create_model_from_haiku(
        hk.transform(lambda batch: hk.Sequential(layers())(batch["x"])),
        {"x": x[:1], "y": y[:1]},
        lambda batch, out: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], out),
    )
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(lr),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=10, num_epochs=1),
    )
    state = algorithm.init(model.init(jax.random.PRNGKey(SEED)))
    sets = [fedjax.ClientDataset({"x": x[rows], "y": y[rows]}) for rows in owned]
    chance = np.random.Generator(np.random.Philox(key=SEED + 1))
    held = {"state": state, "key": jax.random.PRNGKey(SEED)}

    def one_round() -> None:
        chosen = chance.choice(clients, cohort, replace=False)
        held["key"], *keys = jax.random.split(held["key"], cohort + 1)
        asked = [(int(k), sets[k], key) for k, key in zip(chosen, keys, strict=True)]
        held["state"], _ = algorithm.apply(held["state"], asked)
        jax.block_until_ready(held["state"].params)

    serve(one_round)


if __name__ == "__main__":
    main(sys.argv[1])
