"""Which runs are behind the numbers, how they were configured, and on what they ran."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from fedsim.results import words
from fedsim.results.blocks import Block, Cell, Details, Section, Table, Text, Warn
from fedsim.results.groups import Runs, flatten
from fedsim.results.sections import section
from fedsim.results.store import Run


@section(order=700, scope="whole")
def which_runs(runs: Runs) -> Section | None:
    """Unfinished, missing and repeated runs; they enter no number above."""
    unfinished = [(group, run) for group in runs.groups for run in group if not run.finished]
    missing = [(group, *gap) for group in runs.groups for gap in group.missing()]
    repeated = [run for group in runs.groups for run in group.repeated]
    blocks: list[Block] = []
    if not (unfinished or missing or repeated):
        blocks.append(Text(f"All {words.plural(len(runs), 'run')} finished; none is missing."))
    else:
        done = sum(len(group.finished) for group in runs.groups)
        counts: dict[str, Sized] = {
            "unfinished": unfinished,
            "not here": missing,
            "repeated": repeated,
        }
        left_out = words.listed([f"{len(found)} {what}" for what, found in counts.items() if found])
        blocks.append(
            Warn(f"The numbers above are of {words.plural(done, 'finished run')}; {left_out}.")
        )
    if unfinished:
        rows = [[_name(group, run.label), str(run.seed), *_state(run)] for group, run in unfinished]
        heads = ["strategy", "seed", "state", "round", "reason"]
        blocks.append(Table(heads, rows, "Unfinished runs", text_columns=(2, 4)))
    if missing:
        seeds: dict[str, list[int]] = {}
        for group, label, seed in missing:
            seeds.setdefault(_name(group, label), []).append(seed)
        rows = [[name, ", ".join(map(str, which))] for name, which in seeds.items()]
        blocks.append(
            Table(["strategy", "seeds"], rows, "Runs that are not here", text_columns=(1,))
        )
    if repeated:
        names = words.listed([f"{run.label} seed {run.seed}" for run in repeated])
        blocks.append(Text(f"Left out, because a run of the same configuration is here: {names}."))
    numbers = {
        "finished": sum(len(group.finished) for group in runs.groups),
        "unfinished": [
            {**group.setting, "label": run.label, "seed": run.seed, **run.status}
            for group, run in unfinished
        ],
        "missing": [{**g.setting, "label": label, "seed": seed} for g, label, seed in missing],
    }
    return Section("Runs", tuple(blocks), numbers)


@section(order=710, scope="whole")
def configuration(runs: Runs) -> Section | None:
    """What differs between strategies, and the whole resolved configuration."""
    blocks: list[Block] = []
    labels = [label for label in runs.labels if any(run.label == label for run in runs)]
    by_label = {
        label: _merged(flatten(_told(run)) for run in runs if run.label == label)
        for label in labels
    }
    keys = sorted({key for flat in by_label.values() for key in flat})
    differing = [k for k in keys if len({by_label[label].get(k) for label in labels}) > 1]
    if len(labels) > 1 and differing:
        rows: list[list[Cell | str]] = [
            [key, *(by_label[label].get(key, words.NONE) for label in labels)] for key in differing
        ]
        columns = range(1, len(labels) + 1)
        table = Table(["key", *labels], rows, "What differs between the strategies", tuple(columns))
        blocks.append(table)
    whole = _merged(
        flatten({k: v for k, v in run.experiment.items() if k not in ("strategy", "sweep", "tune")})
        for run in runs
    )
    rows = [[key, value] for key, value in whole.items()]
    table = Table(["key", "value"], rows, "The resolved configuration", text_columns=(1,))
    blocks.append(Details(f"The resolved configuration, {len(rows)} keys", (table,)))
    same = {label: flat for label, flat in by_label.items() if flat}
    return Section("Configuration", tuple(blocks), {"experiment": whole, "strategies": same})


@section(order=720, scope="whole")
def provenance(runs: Runs) -> Section | None:
    """Versions, machine, git commit, and the fingerprint of every seed's data."""
    found = _merged(_machine(run) for run in runs)
    rows = [[key, value] for key, value in found.items()]
    blocks: list[Block] = [
        Table(["", "value"], rows, "Versions and machine of all runs", text_columns=(1,))
    ]
    prints = []
    for group in runs.groups:
        for seed in sorted({run.seed for run in group}):
            mine = [run for run in group if run.seed == seed]
            held = sorted({str(run.config.get("data_fingerprint")) for run in mine})
            prints.append((group, seed, held))
    apart = [(group, seed) for group, seed, held in prints if len(held) > 1]
    if apart:
        names = words.listed([_name(group, f"seed {seed}") for group, seed in apart])
        blocks.append(
            Warn(f"Runs of the same seed had different data ({names}): do not trust their pairs.")
        )
    rows = [[_name(g, str(seed)), ", ".join(short(h) for h in held)] for g, seed, held in prints]
    table = Table(["seed", "fingerprint"], rows, "Fingerprint of the data", text_columns=(1,))
    blocks.append(Details(f"Fingerprints of the data, {words.plural(len(rows), 'seed')}", (table,)))
    numbers = {
        **found,
        "data_fingerprints": [
            {**group.setting, "seed": seed, "fingerprints": held} for group, seed, held in prints
        ],
    }
    return Section("Provenance", tuple(blocks), numbers)


def short(digest: str) -> str:
    """The first sixteen characters of a digest."""
    return digest[:16]


def _name(group: Runs, label: str) -> str:
    return f"{label} ({group.name})" if group.name else label


def _state(run: Run) -> list[str]:
    rounds = run.status.get("rounds")
    where = f"{run.status.get('round')}" + (f" of {rounds}" if rounds else "")
    state = str(run.status.get("state"))
    state = "running, or killed" if state == "running" else state
    return [state, where, str(run.status.get("reason") or words.NONE)]


def _told(run: Run) -> dict[str, Any]:
    """The strategy's own keys, without the label; a tuning grid is not what ran."""
    strategy = run.config["strategy"]
    kept = {key: value for key, value in strategy.items() if key not in ("label", "tune")}
    return {**kept, "executor": run.config.get("executor")}


def _machine(run: Run) -> dict[str, Any]:
    env = run.environment
    commit = env.get("git_commit")
    return {
        "git commit": commit and f"{commit}{' (with changes)' if env.get('git_dirty') else ''}",
        "python": env.get("python"),
        **(env.get("versions") or {}),
        "platform": env.get("platform"),
        "cpu": env.get("cpu"),
        "cpu count": env.get("cpu_count"),
    }


def _merged(flats: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """For each key the value, or the values that runs had."""
    values: dict[str, dict[str, None]] = {}
    for flat in flats:
        for key, value in flat.items():
            values.setdefault(key, {})[_value(value)] = None
    return {key: " | ".join(texts) for key, texts in values.items()}


def _value(value: Any) -> str:
    if value is None:
        return words.NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
