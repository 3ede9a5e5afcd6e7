"""Run folders: written whole, the same bytes for the same content, read back or refused clearly."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from fedsim.core.errors import RunError
from fedsim.results import files
from fedsim.results.store import Run, RunWriter, environment, find_runs
from fedsim.results.tables import CLIENTS, ROUNDS, read_table, to_table, write_table

CONFIG = {"experiment": {}, "strategy": {"name": "fedavg", "label": "FedAvg"}, "seed": 3}


def write(path: Path, rows: list[dict], state: str = "finished") -> Path:
    writer = RunWriter(path)
    writer.write_config(CONFIG)
    writer.write_tables(rows, [], [])
    writer.write_status({"state": state, "round": len(rows) - 1, "rounds": 2, "reason": None})
    return path


def test_columns_come_in_a_fixed_order() -> None:
    table = to_table([{"zeta": 1.0, "loss": 2.0}, {"alpha": True, "round": 1}], ROUNDS, "rounds")
    assert table.column_names == [*ROUNDS, "alpha", "zeta"]
    assert table["loss"].to_pylist() == [2.0, None]
    assert table.schema.field("abandoned").type == pa.bool_()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([None, None], pa.float64()),
        ([np.float32(0.5), torch.tensor(0.25)], pa.float64()),
        ([np.int32(3), torch.tensor(4)], pa.int64()),
        ([True, None], pa.bool_()),
        (["a", None], pa.string()),
        ([[1, 2], [3]], pa.list_(pa.int64())),
    ],
)
def test_an_extra_column_has_the_type_of_its_values(values: list, kind: pa.DataType) -> None:
    table = to_table([{"extra": value} for value in values], {}, "rounds")
    assert table.schema.field("extra").type == kind


@pytest.mark.parametrize(
    ("row", "words"),
    [({"round": 0, "extra": object()}, "'extra' of rounds"), ({"round": "first"}, "holds str")],
)
def test_a_value_that_fits_no_column_is_named(row: dict, words: str) -> None:
    with pytest.raises(RunError, match=words):
        to_table([row], ROUNDS, "rounds")


def test_a_column_of_a_mixture_is_refused() -> None:
    with pytest.raises(RunError, match="holds int, str; expected numbers, truth values or text"):
        to_table([{"extra": 1}, {"extra": "x"}], {}, "clients")


def test_nan_null_and_infinity_stay_apart(tmp_path: Path) -> None:
    rows = [{"round": i, "loss": v} for i, v in enumerate([math.nan, None, math.inf, 0.5])]
    run = Run.load(write(tmp_path / "run", rows))
    rounds, values = run.series("loss")
    assert rounds.tolist() == [0, 2, 3]
    np.testing.assert_array_equal(values, [math.nan, math.inf, 0.5])


def test_bytes_depend_on_content_alone(tmp_path: Path) -> None:
    """Written at once, row by row, or by another writer after a resume: the same file."""
    rows = [
        {"round": i, "loss": 1 / (i + 1), **({"gain": i} if i > 2 else {}),
         "ratio": 0.5 if i > 4 else i, "bytes_up": 100 * i}
        for i in range(8)
    ]  # fmt: skip
    clients = [{"round": i, "client": i, "status": "ok" if i else None} for i in range(8)]
    whole = RunWriter(tmp_path / "whole")
    whole.write_tables(rows, clients, [])
    growing = RunWriter(tmp_path / "growing")
    for count in range(6):
        growing.write_tables(rows[:count], clients[:count], [])
    resumed = RunWriter(tmp_path / "growing")
    for count in range(3, 9):
        resumed.write_tables(
            [dict(row) for row in rows[:count]] if count == 4 else rows[:count], clients[:count], []
        )
    for name in ("rounds.parquet", "clients.parquet", "timings.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "growing" / name
        ).read_bytes()


def test_a_growing_list_is_not_converted_twice(tmp_path: Path) -> None:
    class Counting(dict):
        asked = 0

        def get(self, *key):  # type: ignore[no-untyped-def]
            Counting.asked += 1
            return super().get(*key)

    writer, rows = RunWriter(tmp_path), []
    for number in range(20):
        rows.append(Counting(round=number))
        writer.write_tables(rows, [], [])
    assert Counting.asked == 20 * len(ROUNDS)


def test_another_list_replaces_the_old_one(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.write_tables([{"round": i} for i in range(5)], [], [])
    writer.write_tables([{"round": i, "loss": 1.0} for i in range(3)], [], [])
    table = read_table(tmp_path / "rounds.parquet")
    assert table["loss"].to_pylist() == [1.0] * 3


def test_a_crash_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status.json"
    files.write_json(path, {"state": "running"})

    def crash(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, crash)
    assert files.read_json(path) == {"state": "running"}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]

    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(RunError, match=r"cannot write .*status.json: No space; free the disk"):
        files.write_json(path, {"state": "finished"})
    assert files.read_json(path) == {"state": "running"}


def test_file_and_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append("rename"), replace(self, to))[1]
    )
    files.write_text(tmp_path / "x", "x")
    assert order == ["sync", "rename", "sync"]


def test_a_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".rounds.parquet.99.tmp").write_bytes(b"half")
    RunWriter(tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none_stay_out_of_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunWriter(tmp_path).write_config({"seed": math.nan})


def test_an_unknown_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of running"):
        RunWriter(tmp_path).write_status({"state": "done"})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot make the folder .*--out"):
        RunWriter(tmp_path / "file" / "run")


def test_a_run_is_read_back(comparison: Path) -> None:
    run = Run.load(comparison / "fedld-seed2")
    assert (run.label, run.seed, run.finished) == ("FedLD", 2, True)
    assert run.experiment["experiment"]["name"] == "invented"
    assert run.rounds.num_rows == 31
    assert run.clients.column_names == list(CLIENTS)
    assert run.clients.num_rows == 30 * 10 + 50
    assert run.client_columns("round", "nothing").column_names == ["round"]
    assert run.timings["wall_seconds"].to_pylist() == [0.1] * 31
    assert run.cumulative("bytes_up", "bytes_down")[-1] == 30 * 10 * 2 * 178_000
    assert run.cumulative("nothing")[-1] == 0
    assert run.series("nothing")[0].size == 0


def test_an_unfinished_run_is_read(tmp_path: Path) -> None:
    run = Run.load(write(tmp_path / "a", [{"round": 0}], "interrupted"))
    assert not run.finished
    bare = tmp_path / "b"
    RunWriter(bare).write_config(CONFIG)
    run = Run.load(bare)
    assert not run.finished
    assert run.status["reason"] == "no status.json"
    assert (run.rounds.num_rows, run.clients.num_rows, run.timings.num_rows) == (0, 0, 0)
    assert run.client_columns("round", "extra").column_names == ["round"]


def damage(path: Path, name: str, content: bytes | None) -> None:
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "is not a run folder"),
        ("config.json", b"{", "cannot be read"),
        ("config.json", b"[]", "holds no JSON object"),
        ("config.json", b"{}", "has format None; this fedsim reads 1"),
        ("config.json", b'{"format": 1}', "names no strategy"),
        ("status.json", b"\xff", "cannot be read"),
        ("rounds.parquet", b"PAR1 not parquet", "is damaged"),
        ("rounds.parquet", b"", "is damaged"),
        ("rounds.parquet", None, "marked finished but has no rounds.parquet"),
    ],
)
def test_a_damaged_run_is_refused(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    path = write(tmp_path / "run", [{"round": 0}])
    damage(path, name, content)
    with pytest.raises(RunError, match=words) as caught:
        Run.load(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_flipped_bit_in_a_table_is_found(comparison: Path, tmp_path: Path) -> None:
    path = shutil.copytree(comparison / "fedld-seed2", tmp_path / "run")
    content = bytearray((path / "rounds.parquet").read_bytes())
    content[40] ^= 1
    (path / "rounds.parquet").write_bytes(content)
    with pytest.raises(RunError, match="is damaged"):
        Run.load(path)


def test_rounds_without_round_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "run", [{"round": 0}])
    write_table(path / "rounds.parquet", pa.table({"loss": [1.0]}))
    with pytest.raises(RunError, match="no column 'round'"):
        Run.load(path)


def test_runs_are_found_once_and_in_order(comparison: Path, tmp_path: Path) -> None:
    runs = find_runs([comparison, comparison / "fedld-seed0"])
    assert len(runs) == 20
    assert [run.path.name for run in runs[:2]] == ["fedavg-seed0", "fedavg-seed1"]
    folder = shutil.copytree(comparison / "fedld-seed2", tmp_path / "run")
    shutil.copytree(folder, tmp_path / "tune" / "x" / "run")
    shutil.copytree(folder, tmp_path / ".hidden" / "run")
    assert [run.path for run in find_runs(tmp_path)] == [folder]
    assert [run.path for run in find_runs(str(tmp_path / "tune"))] == [tmp_path / "tune/x/run"]


@pytest.mark.parametrize(("name", "words"), [("nothing", "is not a folder"), ("", "holds no run")])
def test_where_there_is_no_run(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(RunError, match=words):
        find_runs(tmp_path / name)


def test_the_environment_is_described() -> None:
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu_count"] == os.cpu_count()
    assert set(found) == {
        "python", "versions", "platform", "cpu", "cpu_count", "git_commit", "git_dirty", "command",
    }  # fmt: skip


def test_git_state_follows_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (environment()["git_commit"], environment()["git_dirty"]) == (None, None)

    def git(*words: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *identity, *words], check=True, capture_output=True)

    (tmp_path / "a").write_text("1")
    git("init")
    git("add", "a")
    git("commit", "-m", "x")
    clean = environment()
    assert len(clean["git_commit"]) == 40
    assert clean["git_dirty"] is False
    (tmp_path / "a").write_text("2")
    assert environment()["git_dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert environment()["git_commit"] is None


def test_importing_the_store_is_light() -> None:
    code = (
        "import sys; import fedsim.results.store; "
        "print([m for m in ('matplotlib', 'scipy', 'torch', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
