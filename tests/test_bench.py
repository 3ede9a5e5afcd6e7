"""scripts/bench: the list of benches, and the rows of each in its quick form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCH, *arguments], capture_output=True, text=True)


def test_help_lists_every_bench_with_what_it_is() -> None:
    done = run("--help")
    assert done.returncode == 0
    names = [p.stem for p in (BENCH.parent / "benches").glob("[a-z]*.py")]
    assert "directions" in names
    for name in names:
        assert any(f"  {name} " in f"{line} " for line in done.stdout.splitlines())
    assert "Seeded directions" in done.stdout
    refused = run("nothing")
    assert refused.returncode == 2
    assert "directions" in refused.stderr


@pytest.mark.slow
def test_directions_writes_rows(tmp_path: Path) -> None:
    done = run("directions", "--quick", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {"official", "torch", "numpy", "fedsim"} <= {row["runner"] for row in rows}
    assert {row["K"] for row in rows} == {1024, 4096}
    for row in rows:
        assert {"basis", "runner", "d", "K", "seconds"} <= set(row)
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert f"{row['basis']}" in done.stdout
