"""What the command line does, as functions: `run`, `compare`, `resume`, `report`, `plan`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedsim import launch
from fedsim.app_config import Settings
from fedsim.app_config import find_strategy as find_strategy
from fedsim.config import Experiment, StrategyConfig, override, parse, slug
from fedsim.core.errors import DataError, RunError
from fedsim.core.events import Notice
from fedsim.core.text import tame
from fedsim.jobs import Jobs
from fedsim.journal import locked
from fedsim.planning import Cost as Cost
from fedsim.planning import Plan as Plan
from fedsim.planning import plan as plan
from fedsim.results.files import remove_leftovers, write_text
from fedsim.runner import OnEvent, RunResult, Task, saved_config
from fedsim.runtime.choose import Choice
from fedsim.runtime.simulation import working_folder
from fedsim.tuning import tune

RUNS = Path("runs")
"""Where runs go when no folder is named."""


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        path: its folder.
        results: the runs that ended.
        failed: label, seed and reason of every run that did not.
        html: the report.
        markdown: its twin.
    """

    path: Path
    results: tuple[RunResult, ...]
    failed: tuple[tuple[str, int, str], ...]
    html: Path
    markdown: Path


def run(
    experiment: Experiment,
    *,
    strategy: str | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    on_event: OnEvent | None = None,
) -> RunResult:
    """Run one strategy with one seed.

    Args:
        experiment: from `fedsim.load_experiment`.
        strategy: label of the strategy; None takes the first.
        seed: None takes the first of the experiment.
        out: the run folder; None makes ``runs/NAME/LABEL-seedN``.
        on_event: told of every start, round and end.

    Raises:
        FedsimError: what the user can mend; what is finished stays on disk.
    """
    entry = find_strategy(experiment, strategy)
    seed = experiment.experiment.seeds[0] if seed is None else seed
    folder = Path(out) if out else RUNS / experiment.experiment.name / run_name(entry, seed)
    return execute(Task(experiment, entry, seed, folder), on_event)


def run_name(entry: StrategyConfig, seed: int) -> str:
    """Name of the run's folder in a comparison."""
    return f"{slug(entry.label)}-seed{seed}"


Begin = Callable[[Task, OnEvent | None, bool], RunResult]
"""Runs a task; the last argument says whether to go on from its last checkpoint."""


def execute(task: Task, on_event: OnEvent | None = None, begin: Begin = launch.start) -> RunResult:
    """Run a task: anew, from its last checkpoint, or not at all if it is finished already.

    Args:
        task: what to run.
        on_event: told of every start, round and end.
        begin: runs it; by default where its ``[runtime]`` says.

    Raises:
        RunError: the folder holds another run.
    """
    before = saved_config(task.path)
    if before is None:
        if task.path.exists() and not all(BEGUN.match(p.name) for p in task.path.iterdir()):
            raise RunError(f"{task.path} is not empty and holds no run; give another --out")
        return begin(task, on_event, False)
    wanted = task.config(Choice(), "")
    for key in ("experiment", "strategy", "seed"):
        if before.get(key) != wanted[key]:
            raise RunError(
                f"{task.path} holds another run (its {key} differs); give another --out, "
                "or remove it"
            )
    done = finished(task)
    if done is not None:
        if on_event:
            on_event(Notice(task.name, "is finished already; nothing to do"))
        return done
    return begin(task, on_event, True)


def serve(settings: Settings, grid: Grid, on_event: OnEvent | None = None) -> RunResult:
    """Run on a Flower grid what a run configuration names; goes on where it was stopped.

    Args:
        settings: the run configuration.
        grid: Flower's grid.
        on_event: told of every start, round and end.
    """
    name = settings.experiment.experiment.name
    folder = working_folder() / (
        settings.out or RUNS / name / run_name(settings.entry, settings.seed)
    )
    task = Task(settings.experiment, settings.entry, settings.seed, folder)

    def begin(task: Task, on_event: OnEvent | None, resume: bool) -> RunResult:
        with locked(task.path):
            return launch.serve(task, grid, on_event, resume=resume, wait=settings.wait)

    return execute(task, on_event, begin)


def finished(task: Task) -> RunResult | None:
    """The result of a task whose folder is finished, else None."""
    from fedsim.results import Run as Folder

    folder = Folder.load(task.path)
    if not folder.finished:
        return None
    last = folder.rounds.slice(folder.rounds.num_rows - 1).to_pylist()[0]
    metrics = {n: float(v) for n, v in last.items() if isinstance(v, (int, float)) and n != "round"}
    return RunResult(task.path, task.entry.label, task.seed, metrics)


def resume(
    path: str | Path, on_event: OnEvent | None = None, *, jobs: int = 1
) -> RunResult | Comparison:
    """Go on with a run or a comparison that was interrupted, to the same bits.

    Args:
        path: its folder.
        on_event: told of every start, round and end.
        jobs: runs of a comparison at a time, see `compare`.

    Raises:
        RunError: the folder is neither, or every checkpoint is damaged.
    """
    folder = Path(path)
    config = saved_config(folder)
    if config is not None:
        return execute(_saved_task(folder, config), on_event)
    plan_file = folder / EXPERIMENT_FILE
    if not plan_file.exists():
        raise RunError(f"{folder} is no run and no comparison; give the folder that --out named")
    try:
        experiment = parse(json.loads(plan_file.read_text()), str(plan_file))
    except (TypeError, ValueError) as error:
        raise RunError(f"{plan_file} is damaged: {error}") from None
    return compare(experiment, out=folder, on_event=on_event, jobs=jobs)


def _saved_task(folder: Path, config: dict[str, Any]) -> Task:
    """The task that a run folder's `config.json` describes."""
    file = folder / "config.json"
    try:
        experiment = parse(config["experiment"], str(file))
        entry = StrategyConfig.model_validate(config["strategy"])
        return Task(experiment, entry, int(config["seed"]), folder)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file} is damaged: {tame(str(error))}") from None


EXPERIMENT_FILE = "experiment.json"
BEGUN = re.compile(r"\.|checkpoints$")
"""What a run killed before its first file leaves behind: its lock, half a file, no checkpoint."""


def compare(
    experiment: Experiment,
    *,
    out: str | Path | None = None,
    on_event: OnEvent | None = None,
    jobs: int = 1,
) -> Comparison:
    """Run every strategy with every seed, then write the report.

    Runs that are finished already are kept, interrupted ones go on. A run that fails does not
    stop the others. With ``[tune]`` the strategies are tuned first; with ``[sweep]`` the whole is
    repeated for every value.

    Args:
        experiment: from `fedsim.load_experiment`.
        out: folder of the comparison; None makes ``runs/NAME``.
        on_event: told of every start, round and end.
        jobs: runs at a time. More than one are processes of their own, which import strategies
            by name and share the cores; the bits are the same.

    Raises:
        RunError: the folder holds another comparison, or cannot be written to.
    """
    folder = Path(out) if out else RUNS / experiment.experiment.name
    with locked(folder):
        return _compare(experiment, folder, on_event, jobs)


def _compare(
    experiment: Experiment, folder: Path, on_event: OnEvent | None, jobs: int
) -> Comparison:
    _claim(folder, experiment)
    results, failed = [], []
    with Jobs(jobs, execute, on_event) as processes:
        runs = [
            Task(variant, entry, seed, place / run_name(entry, seed))
            for variant, place in _variants(experiment, folder)
            for entry in tune(variant, place / "tune", processes.run, on_event)
            for seed in variant.experiment.seeds
        ]
        tasks = [replace(run, index=i, total=len(runs)) for i, run in enumerate(runs, 1)]
        for task, outcome in zip(tasks, processes.run(tasks), strict=True):
            if isinstance(outcome, RunResult):
                results.append(outcome)
                continue
            if isinstance(outcome, DataError) and not results:
                raise outcome  # no other run will get further
            failed.append((task.entry.label, task.seed, str(outcome)))
            if on_event:
                on_event(Notice(task.name, f"failed: {outcome}"))
    html, markdown = report([folder], folder)
    return Comparison(folder, tuple(results), tuple(failed), html, markdown)


def _variants(experiment: Experiment, folder: Path) -> list[tuple[Experiment, Path]]:
    """The experiment once, or once for each value of its sweep, with a folder each."""
    sweep = experiment.sweep
    if sweep is None:
        return [(experiment, folder)]
    return [
        (override(experiment, {sweep.key: value}), folder / f"{sweep.key}={slug(str(value))}")
        for value in sweep.values
    ]


def _claim(folder: Path, experiment: Experiment) -> None:
    """Make the comparison's folder and note the experiment in it.

    Raises:
        RunError: it holds another experiment, or cannot be written to.
    """
    file = folder / EXPERIMENT_FILE
    wanted = experiment.model_dump_json(indent=1)
    try:
        if file.exists() and file.read_text() != wanted and any(folder.rglob("config.json")):
            raise RunError(f"{folder} holds another comparison; give another --out, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be written to: {error.strerror}") from None
    remove_leftovers(folder, *folder.glob("*_files"), *folder.glob("**/tune"))
    write_text(file, wanted)


def report(
    paths: Iterable[str | Path], out: str | Path, title: str | None = None
) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` from run folders.

    Args:
        paths: run folders, or folders that contain them.
        out: where the report goes.
        title: its headline; default: the experiment's name.
    """
    from fedsim.results.report import write_report

    return write_report(list(paths), Path(out), title)
