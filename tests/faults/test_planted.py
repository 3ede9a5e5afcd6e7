"""Every fault test has its fault planted: a test beside it in which it must be found."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ENGINE = {
    "wrong directory": ("runtime/test_remote.py", "test_wrong_directory_is_noticed"),
    "wrong directory, in the engine": (
        "runtime/test_simulation.py",
        "test_dead_actor_wrong_directory_race_and_bfloat16",
    ),
    "round-1 race": ("runtime/test_remote.py", "test_round_1_race"),
    "dead actor": (
        "runtime/test_simulation.py",
        "test_dead_actor_wrong_directory_race_and_bfloat16",
    ),
    "unseeded sampling": ("runtime/test_remote.py", "test_node_ids_do_not_matter"),
    "src_node_id of an error reply": ("runtime/test_remote.py", "test_source_of_error_replies"),
    "bfloat16 tensors": ("runtime/test_remote.py", "test_bfloat16_travels"),
}
"""Known faults of Flower's engine, and the test that names each."""


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


FILES = sorted(p for p in TESTS.rglob("test_*.py") if p != Path(__file__))
FAULTS = [p for p in FILES if p.parent.name == "faults" or "scorecard(" in p.read_text()]


@pytest.mark.parametrize("path", FAULTS, ids=lambda p: str(p.relative_to(TESTS)))
def test_its_fault_is_planted(path: Path) -> None:
    assert any("planted" in name for name in functions(path))


def test_every_row_is_there() -> None:
    rows = {name for path in FILES for name in functions(path) if name.startswith("test_row_")}
    assert {f"test_row_{n}" for n in (1, 2, 4, 5, 8, 9, 10, 12)} <= {
        "_".join(n.split("_")[:3]) for n in rows
    }


@pytest.mark.parametrize("fault", ENGINE)
def test_engine_fault_has_its_test(fault: str) -> None:
    file, name = ENGINE[fault]
    assert name in functions(TESTS / file)
    text = (TESTS / file).read_text(encoding="utf-8")
    assert "planted" in text
