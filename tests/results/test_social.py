"""Gossip, label budgets and shared knowledge in the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedsim.results import social_plots as draw
from fedsim.results.blocks import Table
from fedsim.results.groups import Runs
from fedsim.results.parts import social
from fedsim.results.store import Run, RunWriter
from tests.results.conftest import ENVIRONMENT, experiment

ROUND = {"bytes_up": 1, "bytes_down": 1, "seconds": 1.0, "client_seconds": 1.0, "sampled": 2,
         "admitted": 2, "refused": 0, "abandoned": False}  # fmt: skip


def write(folder: Path, label: str, seed: int, rows: list[dict], artefacts: dict) -> Run:
    """A finished run with these rounds."""
    writer = RunWriter(folder)
    strategy = {"name": label, "label": label, "client": None, "params": {}, "train": {}}
    plan = experiment([], [0, 1], len(rows) - 1, 2) | {"strategy": [strategy]}
    writer.write_config({"format": 1, "experiment": plan, "strategy": strategy, "seed": seed,
                         "executor": "serial", "data_fingerprint": "f"})  # fmt: skip
    writer.write_environment(ENVIRONMENT)
    whole = [{"round": n, **ROUND, **row} for n, row in enumerate(rows)]
    writer.write_tables(whole, [], [{"round": n, "wall_seconds": 0.1} for n in range(len(rows))])
    count = len(rows) - 1
    writer.write_status({"state": "finished", "round": count, "rounds": count, "reason": None})
    for name, content in artefacts.items():
        (folder / "artefacts").mkdir(exist_ok=True)
        (folder / "artefacts" / f"{name}.json").write_text(json.dumps(content))
    return Run.load(folder)


def gossiping(folder: Path, seed: int) -> Run:
    rows = [{"accuracy": 0.1}] + [
        {"accuracy": 0.1 * n, "averaged_accuracy": 0.2 * n, "consensus": 1.0 / n,
         "spectral_gap": 0.5, "peer_bytes": 1000}
        for n in (1, 2, 3)
    ]  # fmt: skip
    graph = {"topology": {"nodes": 4, "edges": [[0, 1], [1, 2], [2, 3], [0, 3]], "name": "ring"}}
    return write(folder, "dfedsam", seed, rows, graph)


def labelling(folder: Path, seed: int) -> Run:
    """Two cycles of two rounds, evaluated at their ends."""
    rows = [{"accuracy": 0.1}] + [
        {"accuracy": (0.3 + 0.1 * n + 0.01 * seed) if n % 2 == 0 else None, "labels": 10 * (n // 3),
         "cycle": (n - 1) // 2}
        for n in (1, 2, 3, 4)
    ]  # fmt: skip
    for n in (1, 2):
        rows[n]["labels"] = 5
    return write(folder, "kafal", seed, rows, {})


def test_gossip_shows_topology_consensus_and_three_ways_of_judging(tmp_path: Path) -> None:
    runs = Runs([gossiping(tmp_path / str(seed), seed) for seed in (0, 1)])
    found = social.gossip(runs)
    assert found is not None
    assert [p.name for p in found.pictures] == ["consensus", "topology-ring"]
    assert "4 nodes, 4 edges" in found.pictures[1].alt
    table = next(b for b in found.blocks if isinstance(b, Table))
    texts = [cell.text for cell in table.cells[0]]
    assert texts[1:3] == ["0.3", "0.6"]
    assert texts[-1] == "3 kB"
    assert found.data["consensus"]["dfedsam"] == pytest.approx([1 / 3, 1 / 3])


def test_label_budgets_take_the_ends_of_cycles(tmp_path: Path) -> None:
    runs = Runs([labelling(tmp_path / str(seed), seed) for seed in (0, 1)])
    found = social.labels(runs)
    assert found is not None
    (numbers,) = found.data["strategies"].values()
    assert numbers["labels"] == [5, 10]
    np.testing.assert_allclose(numbers["values"], [[0.5, 0.7], [0.51, 0.71]])
    assert [p.name for p in found.pictures] == ["label-budgets"]


def test_who_learns_from_whom_is_a_heat_map(tmp_path: Path) -> None:
    weights = [[0.7, 0.3, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]]
    content = {"knowledge": {"clients": [0, 1, 2], "weights": weights, "estimates": []}}
    run = write(tmp_path, "knfu", 0, [{"accuracy": 0.1}, {"accuracy": 0.2}], content)
    found = social.knowledge(Runs([run]))
    assert found is not None
    (picture,) = found.pictures
    assert ".7" in picture.svg
    assert found.data["self_weight"]["knfu"] == pytest.approx(2.5 / 3)


def test_other_runs_have_none_of_it(tmp_path: Path) -> None:
    runs = Runs([write(tmp_path, "fedavg", 0, [{"accuracy": 0.1}, {"accuracy": 0.2}], {})])
    assert social.gossip(runs) is social.labels(runs) is social.knowledge(runs) is None


@pytest.mark.parametrize("name", ["grid", "full"])
def test_large_topologies_are_drawn_without_numbers(name: str) -> None:
    edges = [[i, j] for i in range(30) for j in range(i)]
    picture = draw.topology(name, {"nodes": 30, "edges": edges, "name": name})
    assert picture.svg.startswith("<svg")
    assert ">29<" not in picture.svg
