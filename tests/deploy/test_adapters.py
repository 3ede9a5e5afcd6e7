"""Federated LoRA on real processes and under Ray: the bits it has here, for every shape of message.

What travels differs: whole adapters, adapters of the clients' ranks, one factor, factors in turn,
merges that clients keep, a second adapter sent whole. One adapter for all is in
`test_deployment.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsim import api
from fedsim.config import Experiment
from fedsim.deploy.loopback import Deployment
from fedsim.deploy.session import conduct
from fedsim.runner import Task
from tests.deploy.support import digest, federation, rows, task_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHAPES: dict[str, dict[str, Any]] = {
    "a rank for each client": {"name": "flexlora", "ranks": [1, 4, 2]},
    "ranks that shrink": {"name": "hetlora", "gamma": 0.5, "penalty": 20.0},
    "B alone": {"name": "ffa_lora"},
    "A alone, B stays": {"name": "fedsa_lora"},
    "B and A in turn": {"name": "rolora"},
    "clustered": {"name": "lora_lego", "ranks": [4, 2, 4]},
    "merges that are kept": {"name": "flora", "ranks": [2, 4, 1]},
    "means, and merges that are kept": {"name": "fedex_lora"},
    "clustered merges": {"name": "lora_lego", "mode": "merge_and_reinit"},
    "a second adapter": {"name": "lora_lego", "mode": "residual"},
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with federation(tmp_path_factory.mktemp("deployment"), 3) as (made, _):
        yield made


def experiment(strategy: dict[str, Any], runtime: str = "local") -> Experiment:
    """Four rounds, of which some clients miss some; who gains nothing rests."""
    return Experiment.model_validate(
        {
            "experiment": {"name": "adapters", "rounds": 4, "seeds": [0]},
            "data": {"dataset": "digits", "clients": 3, "central_test_fraction": 0.5},
            "model": {"name": "lora", "base": "mlp", "base_params": {"hidden": [8]}, "rank": 4,
                      "delta": True},
            "cohort": {"size": 2, "patience": 1},
            "train": {"max_steps": 4, "lr": 0.2},
            "evaluate": {"clients_every": 1},
            "runtime": {"executor": "serial", "name": runtime},
            "strategy": [strategy],
        }
    )  # fmt: skip


def local(task: Task) -> dict[str, str]:
    """The digest of the same run in this process."""
    made = experiment(task.experiment.strategy[0].model_dump())
    here = replace(task, experiment=made, path=task.path.with_name("local"))
    api.execute(here)
    return digest(here.path)


@pytest.mark.parametrize("name", SHAPES)
def test_devices_give_the_same_bits(name: str, running: Deployment, tmp_path: Path) -> None:
    task = task_of(experiment(SHAPES[name]), tmp_path / "deployed", SHAPES[name]["name"])
    conduct(running, task)
    assert digest(task.path) == local(task)
    assert [r["admitted"] for r in rows(task.path, "rounds")][:2] == [0, 2]


@pytest.mark.parametrize("name", SHAPES)
def test_ray_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    task = task_of(experiment(SHAPES[name], "ray"), tmp_path / "ray", SHAPES[name]["name"])
    api.execute(task)
    assert digest(task.path) == local(task)
