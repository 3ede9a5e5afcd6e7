"""Which differences are more than the luck of the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from fedsim.results import contrasts, words
from fedsim.results.blocks import Block, Cell, Details, Section, Table, Text
from fedsim.results.groups import Runs
from fedsim.results.parts.outcome import shown
from fedsim.results.sections import section
from fedsim.results.statistics import Pair, by_size, seeds_needed
from fedsim.results.summary import summarise

MOST = 8
"""Strategies of which all pairs are drawn; of more, the pairs of the best one with the others."""


@section(order=300)
def tests(runs: Runs) -> Section | None:
    """Paired tests between all strategies, their differences with intervals, effect sizes."""
    summary = summarise(runs)
    if len(summary.lines) < 2 or not summary.pairs:
        return None
    blocks: list[Block] = [Text(_method(summary.pairs))]
    many, drawn, metric = len(summary.lines) > MOST, summary.pairs, summary.metric
    if many and summary.ranked:
        best = summary.ranked[0].label
        drawn = [pair for pair in summary.pairs if best in (pair.a, pair.b)]
        blocks.append(Text(f"Drawn are the pairs of the best strategy, {best}; all are listed."))
    pictures = [contrasts.differences(runs, drawn, metric)]
    if not many:
        pictures.append(contrasts.matrix(runs, drawn, metric))
    blocks += shown(pictures)
    for column, pairs in summary.tests.items():
        table = _table(runs, column, pairs)
        if column == metric:
            named = f"All {len(pairs)} pairs"
            blocks.append(Details(named, (table,)) if many else table)
        else:
            blocks.append(Details(f"The same for the final {words.name(column)}", (table,)))
    numbers = {
        column: [
            {**asdict(pair), "verdict": pair.verdict, "significant": pair.significant}
            for pair in pairs
        ]
        for column, pairs in summary.tests.items()
    }
    return Section("Are the differences real?", tuple(blocks), numbers)


def _method(pairs: Sequence[Pair]) -> str:
    family = sum(pair.p is not None for pair in pairs)
    text = (
        "Runs with the same seed share data, split and initial model, so strategies are compared "
        "pairwise by seed with an exact two-sided sign-flip permutation test; p values are "
        f"corrected for {words.plural(family, 'pair')} by Holm's method. "
    )
    short = [pair for pair in pairs if pair.p is not None and not pair.enough]
    if short:
        text += (
            "Where it says “not enough seeds to tell”, no outcome could have been significant: the "
            f"test needs {seeds_needed(family)} common seeds for this many pairs. Read the "
            "confidence interval of the difference instead: it assumes that differences are "
            "normally distributed and is not corrected. "
        )
    return (
        text
        + "The effect d_z is the mean difference in units of its standard deviation over seeds."
    )


def _table(runs: Runs, column: str, pairs: Sequence[Pair]) -> Table:
    digits = words.decimals(pair.difference for pair in pairs)
    rows: list[list[Cell | str]] = []
    for pair in by_size(pairs):
        d = pair.difference
        known = d is not None and d.mean == d.mean
        rows.append(
            [
                Cell(f"{pair.a} − {pair.b}"),
                str(len(pair.seeds)),
                words.signed(d.mean, digits) if d is not None and known else words.NONE,
                words.span(d, digits) if d is not None and known else words.NONE,
                words.NONE if pair.effect_size is None else words.signed(pair.effect_size, 2),
                words.p_value(pair.p) if pair.enough else words.NONE,
                words.p_value(pair.p_holm) if pair.enough else words.NONE,
                Cell(
                    pair.verdict,
                    strong=pair.significant,
                    colour=runs.colour(pair.better) if pair.better else None,
                ),
            ]
        )
    heads = ["pair", "seeds", "difference", "95 % CI", "effect d_z", "p", "p (Holm)", "result"]
    return Table(heads, rows, f"Paired tests on the final {words.name(column)}", text_columns=(7,))
