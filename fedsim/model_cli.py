"""Commands for what runs leave: merge adapters, judge models, let them answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer()

Seed = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Of data and base weights.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of FILE. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for machines.")]
On = Annotated[
    list[str] | None,
    typer.Option(
        "--on", metavar="FILE", help="Experiment that gives data and base model. Repeatable."
    ),
]


@app.command("merge-lora")
def merge_lora(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTERS...", help="Folders of peft, or runs.")
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the merged adapter.")],
    method: Annotated[
        str, typer.Option(help="lego, fedit, flora, flexlora, hetlora, ensemble, ties, dare, ...")
    ] = "lego",
    rank: Annotated[
        str | None, typer.Option(metavar="K|sum|max", help="Rank of the result.")
    ] = None,
    no_output_reweight: Annotated[
        bool, typer.Option("--no-output-reweight", help="Leave out that step of lego.")
    ] = False,
    no_parameter_reweight: Annotated[
        bool, typer.Option("--no-parameter-reweight", help="Leave out that step of lego.")
    ] = False,
    weight: Annotated[
        list[float] | None, typer.Option(help="Of each adapter, in order; default: all alike.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Another option of the method. Repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Merge LoRA adapters of one base model; peft loads the result."""
    from fedsim.models import merge_command

    left_out = {"output": no_output_reweight, "parameter": no_parameter_reweight}
    chosen = {f"{step}_reweight": False for step, out_ in left_out.items() if out_}
    merge_command.run(adapters, out, method, rank, weight, option or [], chosen, json)


@app.command()
def evaluate(
    path: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="Run folder, or adapter.")],
    on: On = None,
    answers: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also N greedy answers: Rouge-L, exact match.")
    ] = 0,
    seed: Seed = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Judge a run's model or an adapter, centrally and per client; the same numbers every time.

    Without --on a run is judged on its own data. An adapter is refused if it does not belong to
    the base model of FILE. Default seed: the run's own, or the first of FILE.
    """
    from fedsim import tables, tryout

    rows = tryout.evaluate(path, on or [], seed, set_ or [], answers)
    tables.show_metrics(rows, json)


@app.command()
def chat(
    path: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="Run folder, or adapter.")],
    on: On = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="One instruction; default: read lines.")
    ] = None,
    input_: Annotated[str, typer.Option("--input", metavar="TEXT", help="What it is about.")] = "",
    most: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of an answer.")] = 64,
    seed: Seed = None,
    set_: Set = None,
) -> None:
    """Let a language model answer instructions; greedy, so always the same.

    Lines from the terminal or a pipe are instructions; `instruction | input` gives both.
    """
    from fedsim import tryout

    lines = [f"{prompt} | {input_}"] if prompt is not None else sys.stdin
    for said in tryout.chat(path, on or [], seed, set_ or [], lines, most):
        typer.echo(said)


@app.command("slice")
def slice_(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Finished run of fedspine.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the models.")],
    client: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="N", help="Which client; default: all. Repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Write the pruned models of clients, groups sliced out and adapters merged."""
    from fedsim import slicing, tables

    tables.show_sliced(slicing.export(run, out, client or []), json)
