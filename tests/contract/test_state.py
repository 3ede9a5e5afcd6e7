"""State: a run goes on from its files to the same bits, and a round that fails leaves none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message

from fedsim.core.events import Event, RoundFinished
from fedsim.runner import Run, Task
from fedsim.runtime import flower
from tests.contract import toy
from tests.contract.rows import ROWS, Row, every


def execute(row: Row, folder: Path, stop: int = 0, resume: bool = False) -> dict[str, bytes]:
    """Three rounds, or as many as there are before `stop`; what is on disk then."""

    def interrupt(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.round == stop:
            raise KeyboardInterrupt

    env = toy.environment([row.client], model=row.model)
    task = Task(toy.experiment(row.entry), row.entry, toy.SEED, folder)
    Run(task, interrupt, env=env).execute(resume)
    names = ("*.safetensors", "models/*.safetensors", "*.parquet", "artefacts/*.json")
    files = {str(f.relative_to(folder)): f for name in names for f in folder.glob(name)}
    del files["timings.parquet"]
    return {name: file.read_bytes() for name, file in sorted(files.items())}


@every()
def test_an_interrupted_run_goes_on_to_the_same_bits(row: Row, tmp_path: Path) -> None:
    """Interrupted after the first round, and again after the second."""
    for stop in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            execute(row, tmp_path / "pieces", stop, resume=stop > 1)
    assert execute(row, tmp_path / "pieces", resume=True) == execute(row, tmp_path / "whole")


def failing(message: Message, reply: Message) -> list[Message]:
    return [Message(Error(flower.CLIENT_RAISED, "out of memory"), reply_to=message)]


@every(ROWS)
def test_an_abandoned_round_changes_nothing(row: Row) -> None:
    fed = row.federation(wrap=lambda grid: toy.Unreliable(grid, (1, 2, 4, 5, 7), failing, [2]))
    progress = fed.begin()
    fed.advance(progress)
    before = toy.sha256(progress.arrays), frozen(fed.strategy.state_dict())
    fed.advance(progress)
    assert (toy.sha256(progress.arrays), frozen(fed.strategy.state_dict())) == before
    assert [r["abandoned"] for r in progress.rounds] == [False, False, True]
    assert progress.rounds[2].get("loss") == progress.rounds[1].get("loss")
    fed.advance(progress)
    assert not progress.rounds[3]["abandoned"]
    assert toy.sha256(progress.arrays) != before[0]


def frozen(value: object) -> object:
    """A state that can be compared, and that later changes do not reach."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: frozen(v) for name, v in value.items()}
    return [frozen(v) for v in value] if isinstance(value, list) else value
