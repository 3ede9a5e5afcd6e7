"""Ferret under hostile packets, and from its ledger alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from safetensors.torch import load_file

from fedsim.config import StrategyConfig
from fedsim.core import ferret
from fedsim.core.errors import ConfigError
from fedsim.core.packets import packet
from fedsim.federation import Federation
from fedsim.rebuild import rebuild
from fedsim.runner import Run, Task
from strategies.ferret import Ferret
from tests.contract import toy


def federation(options: Any = None, **params: Any) -> Federation:
    entry = StrategyConfig(name="ferret", params={"bases": 16} | params)
    return toy.federation(entry, **{"model": "mlp", **(options or {})})


def forge(**changes: Any) -> Any:
    def answer(message: Message, reply: Message) -> list[Message]:
        found = np.full((1, 16), changes.get("value", 1.0))
        round = message.content.config_records["config"]["server-round"]
        data = ferret.pack_up(
            int(round) + changes.get("shift", 0),  # type: ignore[arg-type]
            1,
            np.repeat(found, changes.get("blocks", 4), 0),
            np.full(changes.get("blocks", 4), changes.get("count", 2)),
        )[: changes.get("cut")]
        content = RecordDict({**reply.content, "arrays": packet(data)})
        return [Message(content, reply_to=message)]

    return answer


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"value": float("nan")}, "NaN"),
        ({"value": float("inf")}, "NaN"),
        ({"value": 1e30}, "beyond"),
        ({"shift": -1}, "round"),
        ({"blocks": 1}, "blocks"),
        ({"cut": -1}, "coordinates"),
        ({"cut": 3}, "header"),
    ],
    ids=str,
)
def test_a_hostile_packet_is_refused_alone(changes: dict[str, Any], reason: str) -> None:
    fed = federation({"wrap": lambda g: toy.Unreliable(g, (2,), forge(**changes))})
    assert len(fed.strategy.blocks) == 4  # type: ignore[attr-defined]
    progress = toy.run(fed, 1)
    assert [r["refused"] for r in progress.rounds] == [0, 1]
    bad = [r for r in progress.clients if r["client"] == 1 and r["round"] == 1]
    assert reason in bad[0]["reason"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"bases": 0},
        {"server_lr": 0.0},
        {"momentum": 1.0},
        {"momentum": 0.5, "fresh": "round"},
        {"fresh": "never"},
        {"basis": "gaussian"},
        {"budget": "none"},
        {"scaling": "third"},
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Ferret(**wrong)


@pytest.mark.parametrize("params", [{"momentum": 0.5}, {"fresh": "client"}], ids=str)
def test_the_model_is_made_again_from_the_ledger(params: dict[str, Any], tmp_path: Path) -> None:
    entry = StrategyConfig(name="ferret", params={"bases": 8} | params)
    env = toy.environment(["ferret"], model="mlp")
    Run(Task(toy.experiment(entry), entry, toy.SEED, tmp_path), env=env).execute()
    expected = load_file(tmp_path / "model.safetensors")
    found = rebuild(tmp_path, env)
    assert all(torch.equal(found[n], t) for n, t in expected.items())
