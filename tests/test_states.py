"""Clients' states: as many in memory as the budget allows, the others in the checkpoints."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from safetensors.numpy import load

from fedsim import api
from fedsim.config import Experiment
from fedsim.core.packing import pack
from fedsim.journal import Journal, Snapshot
from fedsim.runner import Run, Task
from fedsim.runtime.grid import LocalGrid
from fedsim.states import Piece, digest, pieces, write

FILES = ("model.safetensors", "rounds.parquet", "clients.parquet")


def experiment(strategy: str, **sections: Any) -> Experiment:
    """Some clients of many in every round, so that states lie idle; personal models are judged."""
    return Experiment.model_validate(
        {
            "experiment": {"name": "states", "rounds": 6, "seeds": [0]},
            "data": {"dataset": {"name": "digits"}, "clients": 12},
            "model": {"name": "mlp", "hidden": [8]},
            "cohort": {"size": 4},
            "train": {"batch_size": 50},
            "evaluate": {"every": 3, "clients_every": 3},
            "strategy": [{"name": strategy}],
            **sections,
        }
    )


def task(path: Path, strategy: str, **sections: Any) -> Task:
    made = experiment(strategy, **sections)
    return Task(made, made.strategy[0], 0, path)


def bits(path: Path) -> list[bytes]:
    return [(path / name).read_bytes() for name in FILES]


@pytest.mark.parametrize("strategy", ["scaffold", "ditto", "fedper"])
def test_spilling_changes_no_bit_nor_does_a_kill(strategy: str, tmp_path: Path) -> None:
    nothing = {"runtime": {"state_budget": 0}}
    api.execute(task(tmp_path / "memory", strategy))
    api.execute(task(tmp_path / "disk", strategy, **nothing))
    killed = task(tmp_path / "killed", strategy, **nothing)

    def stop(event: Any) -> None:
        if getattr(event, "round", None) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.execute(killed, stop)
    api.execute(killed)
    assert bits(tmp_path / "memory") == bits(tmp_path / "disk") == bits(tmp_path / "killed")


@pytest.mark.parametrize(("budget", "most"), [(0, 0), (8000, 3), (2**30, 12)])
def test_no_more_states_stay_in_memory_than_the_budget_allows(
    budget: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, spill = [], LocalGrid.spill

    def note(grid: LocalGrid, *args: Any) -> None:
        spill(grid, *args)
        held.append(len(grid._contexts))

    monkeypatch.setattr(LocalGrid, "spill", note)
    api.execute(task(tmp_path / "run", "scaffold", runtime={"state_budget": budget}))
    assert max(held) <= most
    assert budget < 2**30 or max(held) > 6


def test_clients_without_state_take_no_memory(tmp_path: Path) -> None:
    run = Run(task(tmp_path / "run", "fedavg"))
    run.execute()
    assert isinstance(run.grid, LocalGrid)
    assert run.grid._contexts == {}
    assert not list((tmp_path / "run" / "checkpoints").glob("states-*"))


def test_reading_brings_no_state_back_into_memory() -> None:
    grid = LocalGrid(api_app(), 3)
    grid.load_states({2: RecordDict({"own": ConfigRecord({"n": 1})})})
    assert grid.context(2, change=False).state["own"]["n"] == 1
    assert grid._contexts == {}
    assert grid.changed_states() == {}
    grid.context(2).state["own"]["n"] = 2  # type: ignore[index]
    assert set(grid.changed_states()) == {2}
    assert grid.context(2, change=False).state["own"]["n"] == 2
    assert grid.changed_states() == {}, "what was only read is not written again"


def api_app() -> Any:
    from flwr.clientapp import ClientApp

    return ClientApp()


def test_unsaved_states_beyond_the_budget_bring_a_checkpoint_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, save = [], Journal.save

    def note(journal: Journal, snapshot: Snapshot) -> None:
        saved.append(snapshot.round)
        save(journal, snapshot)

    monkeypatch.setattr(Journal, "save", note)
    rarely = {"journal": {"every": 6}}
    api.execute(task(tmp_path / "often", "scaffold", runtime={"state_budget": 0}, **rarely))
    assert saved == [0, 1, 2, 3, 4, 5, 6]
    saved.clear()
    api.execute(task(tmp_path / "rarely", "scaffold", **rarely))
    assert saved == [0, 6]
    assert bits(tmp_path / "often") == bits(tmp_path / "rarely")


def test_a_file_of_states_is_safetensors_and_read_in_pieces(tmp_path: Path) -> None:
    packed = {str(n): pack({"v": list(range(n))}) for n in range(1, 5)}
    with (tmp_path / "one").open("wb") as file:
        name = write(file, packed)
    assert name == digest((tmp_path / "one").read_bytes()).hexdigest()
    found = pieces(tmp_path / "one")
    assert {client: piece.read() for client, piece in found.items()} == packed
    with (tmp_path / "two").open("wb") as file:
        write(file, {**found, "2": pack({"v": "new"})})
    whole = load((tmp_path / "two").read_bytes())
    assert whole["3"].tobytes() == packed["3"]
    assert whole["2"].tobytes() == pack({"v": "new"})
    with pytest.raises(OSError, match="ends before"):
        Piece(tmp_path / "two", 0, 10**6).read()


def test_merging_reads_one_state_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = {str(n): np.full(1000, n, np.uint8).tobytes() for n in range(50)}
    with (tmp_path / "old").open("wb") as file:
        write(file, packed)
    order: list[str] = []
    read = Piece.read

    class Spy(io.BytesIO):
        def write(self, data: Any) -> int:
            order.append("write")
            return super().write(data)

    monkeypatch.setattr(Piece, "read", lambda piece: order.append("read") or read(piece))
    write(Spy(), pieces(tmp_path / "old"))
    assert order == ["write", *["read", "write"] * 50]
