"""One-shot merging of adapters that were trained apart, each on one task, by every merger.

    fedsim run experiments/lora_base.toml
    for seed in 0 1 2; do python experiments/lora_merging.py $seed; done
    python experiments/lora_merging.py

Trains an adapter for each of seven tasks (experiments/lora_task.toml), merges the seven, and judges
every merged adapter on the test instances of these tasks and of seven tasks that neither base nor
adapters have seen. An instance counts as right if the greedy answer is the reference, letter by
letter. Writes runs/lora_merging/results.json and prints means over seeds with 95 % intervals.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from fedsim import api
from fedsim.config import load_experiment
from fedsim.core.criteria import criterion
from fedsim.models.adapters import PeftAdapter, read_adapter
from fedsim.models.merging import merge
from fedsim.tryout import Bench

TASKS = ("upper", "capital", "country", "next_month", "number_word", "kind", "opposite")
OTHERS = ("title", "previous_month", "word_number", "short_month", "next_number", "vowels",
          "last_word")  # fmt: skip
FILE, OUT = "experiments/lora_task.toml", Path("runs/lora_merging")
MERGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LEGO, k = 8": ("lego", {"rank": 8}),
    "LEGO, k = 16": ("lego", {"rank": 16}),
    "LEGO, k = 8, without output reweighting": ("lego", {"rank": 8, "output_reweight": False}),
    "LEGO, k = 8, no reweighting": (
        "lego", {"rank": 8, "output_reweight": False, "parameter_reweight": False}),
    "LEGO, k = 8, signs aligned, balanced": (
        "lego", {"rank": 8, "sign_align": True, "balance": True}),
    "LEGO, k = sum of ranks": ("lego", {"rank": "sum"}),
    "weight average": ("fedit", {}),
    "uniform ensemble": ("ensemble", {}),
    "ensemble cut to rank 8 (FlexLoRA)": ("flexlora", {"rank": 8}),
    "task arithmetic, 0.3": ("task_arithmetic", {"coefficient": 0.3}),
    "task arithmetic, 1": ("task_arithmetic", {"coefficient": 1.0}),
    "TIES, 0.2": ("ties", {"density": 0.2}),
    "TIES on products, 0.2": ("ties", {"density": 0.2, "space": "product"}),
    "DARE, 0.5": ("dare", {"density": 0.5}),
}  # fmt: skip


def only(task: str) -> list[str]:
    """The override that chooses a task."""
    return [f'data.dataset.only=["{task}"]']


def train(task: str, seed: int) -> PeftAdapter:
    """The adapter of a task; a finished run is read, one that was stopped is begun again."""
    folder = OUT / f"{task}-seed{seed}"
    if not (folder / "adapter").exists():
        shutil.rmtree(folder, ignore_errors=True)
        api.run(load_experiment(FILE, only(task)), seed=seed, out=folder)
    return read_adapter(folder)


@torch.no_grad()
def right(bench: Bench, adapter: PeftAdapter | None) -> tuple[float, float]:
    """Share of exact answers, and loss, on the test instances of a bench."""
    rows, data = torch.from_numpy(np.asarray(bench.data.central_test)), bench.data
    with bench.host.wearing(adapter) as module:
        sums = criterion(data.criterion).measure(module(data.fields["x"][rows]),
                                                 data.fields["y"][rows])  # fmt: skip
    # Greedy decoding gives the reference exactly if every of its letters is the likeliest next.
    return float((sums[1] == sums[2]).double().mean()), float(sums[0].sum() / sums[2].sum())


def study(seed: int) -> dict[str, dict[str, tuple[float, float]]]:
    """What every merger gives on every task, for one seed."""
    adapters = {task: train(task, seed) for task in TASKS}
    benches = {t: Bench.of(load_experiment(FILE, only(t)), seed) for t in (*TASKS, *OTHERS)}
    subjects: dict[str, PeftAdapter | None] = {"base alone": None}
    for name, (method, options) in MERGERS.items():
        subjects[name] = merge(list(adapters.values()), method, **options)
    found = {n: {t: right(b, a) for t, b in benches.items()} for n, a in subjects.items()}
    found["each task's own adapter"] = {t: right(benches[t], adapters[t]) for t in TASKS}
    return found


def interval(values: list[float]) -> str:
    """Mean and half the 95 % confidence interval (Student t)."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return f"{mean:.3f} ± {half:.3f}"


def main() -> None:
    """Do one seed, or print the table."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        seed = int(sys.argv[1])
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / f"seed{seed}.json").write_text(json.dumps(study(seed), indent=1))
        return
    found = [json.loads(file.read_text()) for file in sorted(OUT.glob("seed*.json"))]
    print("| merger | exact, its tasks | loss, its tasks | exact, other tasks | loss, other |")
    print("|---|---|---|---|---|")
    for name in found[0]:
        cells = []
        for tasks in (TASKS, OTHERS):
            for column in (0, 1):
                values = [[run[name][t][column] for t in tasks if t in run[name]] for run in found]
                means = [float(np.mean(v)) for v in values if v]
                cells.append(interval(means) if means else "")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
