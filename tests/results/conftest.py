"""Invented run folders: the numbers follow simple laws, so that a test knows what must come out.

`python tests/results/conftest.py FOLDER` writes a comparison to look at.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.results.store import RunWriter

ENVIRONMENT = {
    "python": "3.12.1",
    "versions": {"fedsim-flower": "0.1.0", "flwr": "1.41.0", "torch": "2.13.0", "numpy": "2.4.6"},
    "platform": "Linux-6.1-x86_64",
    "cpu": "Invented CPU",
    "cpu_count": 2,
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "git_dirty": False,
    "command": "fedsim compare invented.toml",
}

# label: (final accuracy, rounds to 63 % of it, bytes per client and round, params)
LAWS: dict[str, tuple[float, float, int, dict[str, Any]]] = {
    "FedAvg": (0.874, 6.0, 177_000, {}),
    "FedProx": (0.879, 6.5, 177_000, {"mu": 0.01}),
    "SCAFFOLD": (0.902, 4.5, 354_000, {}),
    "FedLD": (0.913, 4.0, 178_000, {"form": "margin", "variance": 0.9}),
}

REASONS = {
    "FedAvg": {"not_finite: fc.weight holds NaN": 0.004},
    "FedProx": {"not_finite: fc.weight holds NaN": 0.003},
    "SCAFFOLD": {
        "not_finite: fc.weight holds NaN": 0.004,
        "wrong_shape: control.weight is (10, 5), expected (10, 64)": 0.002,
    },
    "FedLD": {
        "late: no reply before the cut-off": 0.01,
        "error_reply: out of <memory> | disk": 0.002,
    },
}


def experiment(labels: list[str], seeds: list[int], rounds: int, clients: int) -> dict[str, Any]:
    """A resolved experiment, as the round loop writes it."""
    return {
        "experiment": {
            "name": "invented",
            "seeds": seeds,
            "rounds": rounds,
            "description": "Invented numbers for looking at the report.",
        },
        "data": {
            "dataset": {"name": "mnist5k", "params": {}},
            "partition": {"name": "dirichlet", "params": {"alpha": 0.1}},
            "clients": clients,
            "test_fraction": 0.2,
            "seed": None,
        },
        "model": {"name": "cnn", "params": {}},
        "cohort": {"fraction": 0.2, "size": None, "quorum": 0.5},
        "train": {"epochs": 1, "batch_size": 10, "lr": 0.1},
        "evaluate": {"every": 1, "metric": "accuracy", "target": 0.85},
        "strategy": [strategy(label) for label in labels],
        "tune": None,
        "sweep": None,
    }


def strategy(label: str) -> dict[str, Any]:
    """One resolved `[[strategy]]`."""
    name = label.lower()
    return {"name": name, "label": label, "client": name, "params": LAWS[label][3], "train": {}}


def invent_run(
    path: Path,
    label: str,
    seed: int,
    config: dict[str, Any],
    *,
    stop_at: int | None = None,
    kind: str = "accuracy",
    shift: float = 0.0,
) -> None:
    """Write one run folder.

    Args:
        path: where to.
        label: a key of `LAWS`.
        seed: the run's seed; it moves accuracy for all strategies alike.
        config: of `experiment`.
        stop_at: round in which the run was killed.
        kind: `accuracy`, `perplexity` (a language model: no client columns) or `mse`.
        shift: added to the final accuracy.
    """
    rounds, clients = config["experiment"]["rounds"], config["data"]["clients"]
    top, tau, size, _ = LAWS[label]
    draw = np.random.default_rng([seed, sorted(LAWS).index(label)])
    top += shift + 0.012 * np.random.default_rng(seed).standard_normal()
    top += 0.004 * draw.standard_normal()
    cohort = max(1, clients // 5)
    rows, client_rows = [], []
    for number in range((rounds if stop_at is None else stop_at) + 1):
        accuracy = 0.1 + (top - 0.1) * (1 - np.exp(-number / tau)) + 0.006 * draw.standard_normal()
        loss = 2.3 * (1 - accuracy) + 0.05
        chosen = np.sort(draw.choice(clients, cohort, replace=False)) if number else []
        statuses = []
        for client in chosen:
            status, reason = "ok", None
            for text, chance in REASONS[label].items():
                if draw.random() < chance:
                    reason, code = text, text.partition(":")[0]
                    status = {"late": "late", "error_reply": "error"}.get(code, "refused")
            statuses.append(status)
            client_rows.append(
                {"round": number, "client": int(client), "name": f"client {client}",
                 "status": status, "reason": reason, "examples": 80,
                 "bytes_up": size, "bytes_down": size, "seconds": 1.0 + client / clients,
                 "loss": loss}
            )  # fmt: skip
        row: dict[str, Any] = {
            "round": number,
            "loss": loss,
            "bytes_up": size * len(chosen),
            "bytes_down": size * len(chosen),
            "seconds": 2.0 if number else 0.0,
            "client_seconds": float(sum(1.0 + client / clients for client in chosen)),
            "sampled": len(chosen),
            "admitted": statuses.count("ok"),
            "refused": len(statuses) - statuses.count("ok"),
            "abandoned": False,
            "train_loss": loss * 0.9 if number else None,
        }
        if kind == "accuracy":
            row["accuracy"] = accuracy
        elif kind == "perplexity":
            row["perplexity"] = float(np.exp(2 * loss))
        if label == "FedLD":
            row["kept_directions"] = 6 + 3 * np.exp(-number / 10) + 0.1 * draw.standard_normal()
        if label == "SCAFFOLD":
            row["control_norm"] = 0.2 * number**0.5 + 0.02 * draw.standard_normal()
        if kind == "accuracy" and number == rounds:
            measured = np.clip(accuracy - draw.exponential(0.9 - 0.8 * top, clients) + 0.08, 0, 1)
            row["client_loss"] = loss * 1.1
            row["client_accuracy"] = float(measured.mean())
            row["client_worst10"] = float(np.sort(measured)[: max(1, clients // 10)].mean())
            for client, value in enumerate(measured):
                client_rows.append(
                    {"round": number, "client": client, "name": f"client {client}",
                     "eval_examples": 20, "eval_loss": 2.3 * (1 - value),
                     "eval_accuracy": float(value)}
                )  # fmt: skip
        rows.append(row)
    writer = RunWriter(path)
    mine = next(item for item in config["strategy"] if item["label"] == label)
    writer.write_config(
        {"experiment": config, "strategy": mine, "seed": seed, "executor": "batched",
         "data_fingerprint": f"{seed:064x}"}
    )  # fmt: skip
    writer.write_environment(ENVIRONMENT)
    writer.write_tables(
        rows, client_rows, [{"round": r["round"], "wall_seconds": 0.1} for r in rows]
    )
    killed = stop_at is not None
    writer.write_status(
        {"state": "interrupted" if killed else "finished", "round": rows[-1]["round"],
         "rounds": rounds, "reason": "stopped by Ctrl-C" if killed else None}
    )  # fmt: skip


def invent(
    folder: Path,
    *,
    labels: tuple[str, ...] = tuple(LAWS),
    seeds: int = 5,
    rounds: int = 30,
    clients: int = 50,
    kind: str = "accuracy",
    unfinished: tuple[str, int] | None = None,
    missing: tuple[str, int] | None = None,
    sweep: dict[float, float] | None = None,
    evaluate: dict[str, Any] | None = None,
) -> Path:
    """Write a comparison: one run for each strategy and seed, for each value of a sweep.

    Args:
        folder: where to.
        labels: strategies, keys of `LAWS`.
        seeds: number of seeds.
        rounds: rounds of a run.
        clients: number of clients.
        kind: see `invent_run`.
        unfinished: label and seed of a run that was killed half-way.
        missing: label and seed of a run that is not there.
        sweep: values of `data.partition.alpha`, each with what it adds to accuracy.
        evaluate: changes to `[evaluate]`.
    """
    config = experiment(list(labels), list(range(seeds)), rounds, clients)
    if kind != "accuracy":
        config["evaluate"] |= {"metric": "loss" if kind == "mse" else kind, "target": None}
    config["evaluate"] |= evaluate or {}
    for alpha, shift in (sweep or {0.1: 0.0}).items():
        here = copy.deepcopy(config)
        here["data"]["partition"]["params"]["alpha"] = alpha
        place = folder / f"data.partition.alpha={alpha}" if sweep else folder
        for label in labels:
            for seed in range(seeds):
                if (label, seed) == missing:
                    continue
                invent_run(
                    place / f"{label.lower()}-seed{seed}",
                    label,
                    seed,
                    here,
                    stop_at=rounds // 2 if (label, seed) == unfinished else None,
                    kind=kind,
                    shift=shift,
                )
    return folder


def write_run(
    path: Path,
    label: str,
    seed: int,
    rows: list[dict[str, Any]],
    *,
    clients: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    state: str = "finished",
) -> Path:
    """Write a run with exactly these rows; rounds are numbered where they have no number."""
    writer = RunWriter(path)
    writer.write_config(
        {"experiment": config or {}, "strategy": {"name": label, "label": label}, "seed": seed,
         "executor": "serial", "data_fingerprint": "f" * 64}
    )  # fmt: skip
    writer.write_tables([{"round": i} | row for i, row in enumerate(rows)], clients or [], [])
    writer.write_status({"state": state, "round": len(rows) - 1, "rounds": None, "reason": None})
    return path


@pytest.fixture(scope="session")
def written() -> Any:
    """The function `write_run`, for tests that need exact numbers."""
    return write_run


@pytest.fixture(scope="session")
def inventor() -> Any:
    """The function `invent`, for tests that write their own comparison."""
    return invent


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 strategies, 5 seeds, 30 rounds, 50 clients; one run was killed. Read only."""
    return invent(tmp_path_factory.mktemp("comparison"), unfinished=("FedProx", 4))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 strategies, 2 seeds, 3 rounds, 10 clients, for tests of form. Read only."""
    folder = tmp_path_factory.mktemp("small")
    return invent(folder, labels=("FedAvg", "FedProx"), seeds=2, rounds=3, clients=10)


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 strategies, 8 seeds, 6 rounds at three values of one key. Read only."""
    return invent(
        tmp_path_factory.mktemp("sweep"),
        labels=("FedAvg", "FedLD"),
        seeds=8,
        rounds=6,
        clients=20,
        sweep={0.1: 0.0, 1.0: 0.04, 10.0: 0.06},
    )


if __name__ == "__main__":
    target = Path(sys.argv[1])
    invent(target / "five", unfinished=("FedProx", 4), missing=("SCAFFOLD", 3))
    invent(target / "ten", seeds=10)
    invent(target / "sweep", seeds=8, sweep={0.1: 0.0, 1.0: 0.04, 10.0: 0.06})
    invent(target / "language", labels=("FedAvg", "FedLD"), seeds=3, kind="perplexity")
    invent(target / "long", rounds=1000)
