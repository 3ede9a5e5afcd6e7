"""Time of a round of FedKSeed and of Ferret on a language model, local work and rebuilding apart.

As in Ferret's tables: FedKSeed takes 200 zeroth-order steps and rebuilds from K = 4096 seeds,
Ferret 10 gradient steps (all with one example), projects its update on at most 200 bases a block
and rebuilds from as many. A few steps are timed; what is linear, steps and draws, is scaled.
One thread, as in a run; processor time.

Usage: scripts/bench rounds [--model FILE.gguf|FOLDER|ID] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.core import directions, ferret, kseed
from fedsim.core.zeroth import two_point

SMOLLM2 = "~/.cache/fedsim/models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"
POOL, STEPS, BASES, GRADIENTS = 4096, 200, 200, 10


def taken(work: Callable[[], Any], times: int = 1) -> float:
    """Processor seconds of one call: the mean of some, after a first one."""
    work()
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def main(argv: Sequence[str]) -> int:
    """Measure, print, write."""
    from fedsim.config import parse
    from fedsim.runtime.work import Environment

    parser = argparse.ArgumentParser(
        prog="scripts/bench rounds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    experiment = parse(
        {
            "experiment": {"name": "rounds", "seeds": [0]},
            "data": {
                "dataset": {"name": "instruction_tasks", "tokenizer": options.model, "length": 24},
                "partition": "natural",
            },
            "model": {"name": "hf_causal_lm", "path": options.model},
            "strategy": [{"name": "fedkseed"}],
        }
    )
    env = Environment.of(experiment, 0)
    model, layout = env.model, env.model.layout
    resident, rows = model.resident, torch.arange(1)
    fields = {n: t[rows] for n, t in env.data.fields.items()}
    w = resident.flat[: layout.num_trainable]

    @torch.no_grad()
    def loss() -> float:
        outputs = model.outputs(resident.flat, resident.beside, fields["x"])
        return float(model.criterion(outputs, fields["y"]))

    def zeroth() -> None:
        two_point(w, 7, 1e-3, loss)
        directions.perturb(w, 7, 1e-3)

    def first() -> None:
        _, parts = model.gradients(resident.flat, {}, fields, model.criterion)
        for name, part in zip(layout.trainable, parts, strict=True):
            if part is not None:
                layout.view(w, name).add_(part, alpha=-1e-4)

    seconds = {"zeroth-order step": taken(zeroth, 3), "forward pass": taken(loss, 3)}
    start = w.clone()
    seconds["gradient step"] = taken(first, 3)
    for _ in range(GRADIENTS - 4):
        first()
    delta = start - w
    spans = [layout.span(n) for n in layout.trainable]
    blocks = ferret.blocks_of([s.stop - s.start for s in spans])
    norms = [float(part.norm()) for part in delta.split(blocks)]
    counts = ferret.counts_of(norms, BASES)
    draws = int((counts * np.array(blocks)).sum())
    few, seeds = np.minimum(counts, 2), directions.pool(1, 32)
    share = draws / int((few * np.array(blocks)).sum())
    found = ferret.project(delta, seeds[:2], blocks, few)
    projection = taken(partial(ferret.project, delta, seeds[:2], blocks, few)) * share
    rebuilding = taken(partial(ferret.add, w, seeds[:2], blocks, found)) * share
    some = np.full(8, 1e-9)
    pool = taken(partial(kseed.rebuild, w, seeds[:8], some, 1.0, "gaussian")) * POOL / 8
    table = {
        "fedkseed": (STEPS * seconds["zeroth-order step"], pool),
        "ferret": (GRADIENTS * seconds["gradient step"] + projection, rebuilding),
    }
    print(f"{layout.num_trainable:,} parameters, {len(blocks)} blocks, {counts.sum()} coordinates")
    print(*(f"{name}: {value:.3f} s" for name, value in seconds.items()), sep="; ")
    print(f"projection {projection:.1f} s of Ferret's local work; {draws:.3g} draws")
    print(f"{'s/round':10}{'local':>10}{'rebuild':>10}{'total':>10}")
    for name, (local, rebuild) in table.items():
        print(f"{name:10}{local:10.1f}{rebuild:10.1f}{local + rebuild:10.1f}")
    ratios = [a / b for a, b in zip(table["fedkseed"], table["ferret"], strict=True)]
    whole = sum(table["fedkseed"]) / sum(table["ferret"])
    print(f"{'ratio':10}{ratios[0]:10.1f}{ratios[1]:10.1f}{whole:10.1f}")
    if options.json:
        content = {"seconds": seconds, "projection": projection, "rounds": table,
                   "coordinates": int(counts.sum()), "draws": draws}  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0
