"""The `fedsim` command: arguments, display and exit codes; what it does is in `fedsim.api`.

Nothing heavy is imported before a command needs it: `fedsim --help` has to come up at once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperGroup

from fedsim import __version__
from fedsim.core.errors import ConfigError, FedsimError
from fedsim.core.text import tame
from fedsim.deploy.cli import app as device
from fedsim.model_cli import app as models

if TYPE_CHECKING:
    from fedsim.api import Comparison
    from fedsim.config import Experiment
    from fedsim.core.events import Event
    from fedsim.progress import OnEvent
    from fedsim.runner import RunResult

BUG, FAILED, INTERRUPTED, TERMINATED = 1, 4, 130, 143

EXIT_CODES = """Exit codes:

0 done

1 a bug in fedsim; the traceback is in a file that the message names

2 the experiment or the command line is wrong

3 the data are not there, or not usable

4 a run failed, or a folder cannot be used

130 interrupted (143: terminated): finished rounds are on disk, `fedsim resume` goes on"""


class Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, with an exit code of its own."""


class Guarded(TyperGroup):
    """Turns whatever a command raises into one clear message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt as stop:
            folder: Path | None = ctx.meta.get("folder")
            rest = "nothing was written"
            if folder is not None and folder.exists():
                rest = f"finished rounds are on disk; go on with: fedsim resume {folder}"
            _say(f"interrupted; {rest}")
            raise typer.Exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED) from None
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            raise typer.Exit(_explain(error)) from None


def _explain(error: Exception) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, ConfigError) and len(error.faults) > 1:
        lines = [f"{len(error.faults)} faults:", *map(str, error.faults)]
        _say("\n  ".join(lines))
        return error.exit_code
    if isinstance(error, FedsimError):
        _say(str(error))
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None and error.errno != errno.EPIPE:
        _say(f"{tame(str(error.filename))} cannot be used: {error.strerror}")
        return FAILED
    if isinstance(error, BrokenPipeError):  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    _say(
        f"bug: {type(error).__name__}: {tame(str(error))}; "
        f"the traceback is in {_log(error)}, please report it"
    )
    return BUG


def _log(error: Exception) -> str:
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="fedsim-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            log.write(f"fedsim {__version__}, Python {sys.version}\n")
            log.write("".join(traceback.format_exception(error)))
            return log.name
    except OSError:
        return "no file, for none could be written (run it again with fedsim --debug)"


def _say(text: str) -> None:
    typer.echo(f"fedsim: {text}", err=True)


app = typer.Typer(
    cls=Guarded,
    name="fedsim",
    help="Simulate and compare federated learning algorithms.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

File = Annotated[str, typer.Argument(metavar="FILE", help="Experiment, a TOML file.")]
Out = Annotated[str | None, typer.Option(metavar="DIR", help="Folder for the results.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the file: `train.lr=0.05`, `strategy.LABEL.mu=0.1`. Repeatable.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, max=2**63 - 1, metavar="N", help="Default: the first of the file."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for machines.")]
Jobs = Annotated[
    int,
    typer.Option(
        min=1, max=1000, metavar="N", help="Runs at a time, each a process. Changes no bit."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]


class Kind(StrEnum):
    """What `fedsim list` lists."""

    strategies = "strategies"
    clients = "clients"
    datasets = "datasets"
    models = "models"
    partitioners = "partitioners"
    devices = "devices"
    oracles = "oracles"


app.add_typer(device)
app.add_typer(models)


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error as it is.")
    ] = False,
) -> None:
    _endings.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    # A user's own strategy, named as "module:Class", lies in the working folder.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


_endings: list[type[KeyboardInterrupt]] = []
"""What signals have asked for: a library may swallow an exception that is raised in its midst."""


def _end(number: int, frame: object) -> None:
    _endings.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
    raise _endings[-1]


@app.command()
def run(
    ctx: typer.Context,
    file: File,
    strategy: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Which strategy; default: the first.")
    ] = None,
    seed: Seed = None,
    out: Out = None,
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run one strategy with one seed. DIR is the run folder; default runs/NAME/LABEL-seedN."""
    experiment = _load(file, set_)
    from fedsim import api

    entry = api.find_strategy(experiment, strategy)
    number = experiment.experiment.seeds[0] if seed is None else seed
    name = experiment.experiment.name
    folder = _note(ctx, Path(out) if out else api.RUNS / name / api.run_name(entry, number))
    with _showing(json, quiet) as on_event:
        result = api.run(experiment, strategy=strategy, seed=number, out=folder, on_event=on_event)
    _show_result(result, json)


@app.command()
def compare(
    ctx: typer.Context,
    file: File,
    out: Out = None,
    set_: Set = None,
    jobs: Jobs = 1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run every strategy with every seed and write the report. Default DIR: runs/NAME."""
    experiment = _load(file, set_)
    from fedsim import api

    folder = _note(ctx, Path(out) if out else api.RUNS / experiment.experiment.name)
    with _showing(json, quiet) as on_event:
        result = api.compare(experiment, out=folder, on_event=on_event, jobs=jobs)
    _show_result(result, json)


@app.command()
def resume(
    ctx: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run or comparison.")],
    jobs: Jobs = 1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with what was interrupted; the result is the same to the bit."""
    from fedsim import api

    path = _note(ctx, Path(folder))
    with _showing(json, quiet) as on_event:
        result = api.resume(path, on_event, jobs=jobs)
    _show_result(result, json)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUNS...", help="Run folders, or above.")],
    out: Out = None,
    title: Annotated[str | None, typer.Option(help="Headline of the report.")] = None,
) -> None:
    """Write report.html and report.md from run folders. Default DIR: the folder if it is one."""
    from fedsim import api

    target = out or (runs[0] if len(runs) == 1 else ".")
    for path in api.report(runs, target, title):
        typer.echo(path)


@app.command()
def check(file: File, set_: Set = None, json: Json = False) -> None:
    """Check a file and print the plan: runs, clients, examples, bytes, and what it will cost."""
    experiment = _load(file, set_)
    from fedsim import api

    plan = api.plan(experiment)
    from fedsim import tables

    tables.show_plan(plan, json)


@app.command()
def tune(
    file: File,
    rounds: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="Rounds to time for each.")
    ] = 2,
    seed: Seed = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Time all executors on this machine; print `runtime.executor` and `runtime.workers` to set.

    Parameters of strategies are another matter: the file's section `tune`, which `compare` obeys.
    """
    experiment = _load(file, set_)
    from fedsim import speed, tables

    tables.show_speeds(speed.measure(experiment, rounds, seed), json)


@app.command()
def schema() -> None:
    """Print the JSON schema of experiment files."""
    import json

    from fedsim.config import schema as of_experiment

    typer.echo(json.dumps(of_experiment(), indent=2))


@app.command()
def partition(
    file: File,
    plot: Annotated[str, typer.Option(metavar="PNG", help="Picture to draw.")] = "partition.png",
    seed: Seed = None,
    set_: Set = None,
) -> None:
    """Draw which client has how many examples of what."""
    experiment = _load(file, set_)
    from fedsim.data import load, plot_partition

    number = experiment.experiment.seeds[0] if seed is None else seed
    typer.echo(plot_partition(load(experiment.data, number), plot))


@app.command("list")
def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    json: Json = False,
) -> None:
    """List the names that an experiment can use, plug-ins included."""
    from fedsim import registry, tables

    tables.show_names({n: registry.describe(kind.value, n) for n in registry.names(kind)}, json)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"fedsim {__version__}")


def _load(file: str, overrides: list[str] | None) -> Experiment:
    from fedsim.config import load_experiment

    return load_experiment(file, overrides or ())


def _note(ctx: typer.Context, folder: Path) -> Path:
    """Remember where finished rounds are, should the user interrupt."""
    ctx.meta["folder"] = folder
    return folder


@contextmanager
def _showing(as_json: bool, quiet: bool) -> Iterator[OnEvent]:
    """What shows a run's events, and ends the run if a signal came and was swallowed."""
    from fedsim import progress

    with progress.showing(progress.mode(as_json, quiet)) as show:

        def on_event(event: Event) -> None:
            show(event)
            if _endings:
                raise _endings[-1]

        yield on_event


def _show_result(result: RunResult | Comparison, as_json: bool) -> None:
    """Print what came out; exit with 4 if a run of a comparison failed."""
    from fedsim import tables
    from fedsim.api import Comparison

    if not isinstance(result, Comparison):
        tables.show_run(result, as_json)
        return
    tables.show_comparison(result, as_json)
    if result.failed:
        for label, seed, reason in result.failed:
            _say(f"{label} seed {seed} failed: {reason}")
        raise typer.Exit(FAILED)


def main() -> None:
    """Entry point of the console command."""
    app(prog_name="fedsim")
