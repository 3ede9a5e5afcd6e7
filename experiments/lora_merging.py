"""One-shot merging of adapters that were trained apart, each on one task, by every merger.

    fedsim compare experiments/lora_base.toml
    for seed in 0 1 2 3 4; do python experiments/lora_merging.py $seed; done
    python experiments/lora_merging.py

Trains an adapter for each of seven tasks (experiments/lora_task.toml) on the base of the same seed,
which has its own instances. Merges the seven, and judges every merged adapter on the test instances
of these tasks and of seven tasks that neither base nor adapters have seen: by the share of exact
greedy answers, the share of letters that are the likeliest after the right ones before them, and
the loss of a letter. Three settings: adapters with random starts of their own; with one common
start, as one training script gives them; and with random starts and ranks from 2 to 16. Two
questions on single adapters besides: what is left of an adapter merged with a copy of itself whose
ranks are permuted, and of one cut to half its rank.

Writes runs/lora_merging/seedN.json; without an argument prints means over seeds with 95 %
intervals (Student t), and how much higher each loss is than that of LoRA-LEGO, seed by seed.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fedsim import api
from fedsim.config import load_experiment
from fedsim.core.criteria import criterion
from fedsim.core.errors import ConfigError
from fedsim.core.lora import Factors
from fedsim.models.adapters import PeftAdapter, read_adapter
from fedsim.models.merging import MergedAdapter, merge
from fedsim.tryout import Bench

TASKS = ("upper", "capital", "country", "next_month", "number_word", "kind", "opposite")
OTHERS = ("title", "previous_month", "word_number", "short_month", "next_number", "vowels",
          "last_word")  # fmt: skip
SETTINGS = {"own starts": (8,), "one start": (8,), "ranks 2 to 16": (2, 4, 8, 16)}
"""Ranks of the adapters, in turn."""
FILE, OUT = "experiments/lora_task.toml", Path("runs/lora_merging")
MERGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LEGO, k = 8": ("lego", {"rank": 8}),
    "LEGO, k = 8, no parameter reweighting": ("lego", {"rank": 8, "parameter_reweight": False}),
    "LEGO, k = 8, unit features": ("lego", {"rank": 8, "feature": "unit"}),
    "LEGO, k = 8, signs aligned, balanced": (
        "lego", {"rank": 8, "sign_align": True, "balance": True}),
    "LEGO, k = 16": ("lego", {"rank": 16}),
    "LEGO, k = 16, no output reweighting": ("lego", {"rank": 16, "output_reweight": False}),
    "LEGO, k = sum of ranks": ("lego", {"rank": "sum"}),
    "LEGO by mass, k = 8": ("lego", {"rank": 8, "mass": True}),
    "weight average": ("fedit", {}),
    "mean update": ("ensemble", {}),
    "mean update cut to rank 8 (FlexLoRA)": ("flexlora", {"rank": 8}),
    "task arithmetic, 0.3": ("task_arithmetic", {"coefficient": 0.3}),
    "task arithmetic, 1": ("task_arithmetic", {"coefficient": 1.0}),
    "TIES, 0.2": ("ties", {"density": 0.2}),
    "TIES on products, 0.2": ("ties", {"density": 0.2, "space": "product"}),
    "DARE, 0.5": ("dare", {"density": 0.5}),
    "DARE on products, 0.5": ("dare", {"density": 0.5, "space": "product"}),
}  # fmt: skip
REFERENCE = "LEGO, k = 8"
Scores = tuple[float, float, float]
"""Share of exact answers, share of right letters, loss of a letter."""
Found = dict[str, dict[str, Scores]]
"""By subject and task."""


def only(task: str) -> list[str]:
    """The override that chooses a task."""
    return [f'data.dataset.only=["{task}"]']


def train(task: str, seed: int, setting: str) -> PeftAdapter:
    """The adapter of a task; a finished run is read, one that was stopped is begun again."""
    number, ranks = TASKS.index(task), SETTINGS[setting]
    rank = ranks[number % len(ranks)]
    folder = OUT / f"{setting.replace(' ', '-')}-{task}-seed{seed}"
    if not (folder / "adapter").exists():
        shutil.rmtree(folder, ignore_errors=True)
        # The run's seed draws A and the minibatches; instances and base stay those of `seed`.
        own = seed if setting == "one start" else 1000 * (1 + number) + seed
        more = [f"data.seed={seed}", f'model.weights="runs/lora_base/fedadam-seed{seed}"',
                f"model.rank={rank}", f"model.alpha={2 * rank}"]  # fmt: skip
        api.run(load_experiment(FILE, only(task) + more), seed=own, out=folder)
    return read_adapter(folder)


@torch.no_grad()
def right(bench: Bench, answer: Callable[[Tensor], Tensor]) -> Scores:
    """How an answering network does on the test instances of a bench."""
    rows, data = torch.from_numpy(np.asarray(bench.data.central_test)), bench.data
    x, y = data.fields["x"][rows], data.fields["y"][rows]
    sums = criterion(data.criterion).measure(answer(x), y)
    # Greedy decoding gives the reference exactly if every of its letters is the likeliest next.
    exact = float((sums[1] == sums[2]).double().mean())
    loss, letters, count = sums.double().sum(1).tolist()
    return exact, letters / count, loss / count


def wearing(bench: Bench, adapter: PeftAdapter | None) -> Scores:
    """As `right`, of the base with an adapter."""
    with bench.host.wearing(adapter) as module:
        return right(bench, module)


def together(bench: Bench, adapters: list[PeftAdapter]) -> Scores:
    """As `right`, of the mean of the outputs of whole networks, one for each adapter."""
    return right(bench, lambda x: bench.host.outputs(adapters, x, together=False).mean(0))


def permuted(adapter: PeftAdapter, seed: int) -> PeftAdapter:
    """The same adapter, its ranks in another order."""
    draw = np.random.default_rng(seed)
    turned = {}
    for name, f in adapter.factors.items():
        order = draw.permutation(f.rank).tolist()
        turned[name] = Factors(f.a[order], f.b[:, order], f.scaling)
    return replace(adapter, factors=turned)


def merged(adapters: list[PeftAdapter]) -> dict[str, MergedAdapter]:
    """What the mergers make of adapters, but for those that need equal ranks and have not."""
    found = {}
    for name, (method, options) in MERGERS.items():
        try:
            found[name] = merge(adapters, method, **options)
        except ConfigError:
            assert len({f.rank for a in adapters for f in a.factors.values()}) > 1
    return found


def study(seed: int) -> dict[str, Found]:
    """What every merger gives on every task, for one seed."""
    benches = {t: Bench.of(load_experiment(FILE, only(t)), seed) for t in (*TASKS, *OTHERS)}
    results: dict[str, Found] = {}
    for setting in SETTINGS:
        adapters = {task: train(task, seed, setting) for task in TASKS}
        several = list(adapters.values())
        found: Found = {"base alone": {t: wearing(b, None) for t, b in benches.items()}}
        found["each task's own adapter"] = {t: wearing(benches[t], adapters[t]) for t in TASKS}
        for name, adapter in merged(several).items():
            if adapter.gamma is not None:
                print(f"seed {seed}, {setting}, {name}: reweighting by {adapter.gamma[0]:.2f} on "
                      f"average; clustered by rank index: {adapter.degenerate}")  # fmt: skip
            found[name] = {t: wearing(b, adapter) for t, b in benches.items()}
        found["mean of seven networks' outputs"] = {
            t: together(b, several) for t, b in benches.items()
        }
        results[setting] = found
    own = {task: train(task, seed, "own starts") for task in TASKS}
    single: dict[str, Callable[[PeftAdapter], PeftAdapter]] = {
        "as it is": lambda a: a,
        "and a permuted copy, LEGO, k = 8": lambda a: merge([a, permuted(a, seed)], "lego"),
        "and a permuted copy, weight average": lambda a: merge([a, permuted(a, seed)], "fedit"),
        "cut to rank 4 by LEGO": lambda a: merge([a], "lego", rank=4),
        "cut to rank 4 by singular values": lambda a: merge([a], "flexlora", rank=4),
    }
    results["single adapters"] = {
        name: {t: wearing(benches[t], change(own[t])) for t in TASKS}
        for name, change in single.items()
    }
    return results


def interval(values: list[float]) -> str:
    """Mean and half the 95 % confidence interval (Student t)."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return f"{mean:.3f} ± {half:.3f}"


def table(runs: list[Found]) -> None:
    """Print one setting."""
    names = "exact", "letters", "loss"
    heads = [f"{name}, {whose} tasks" for whose in ("its", "other") for name in names]
    heads.insert(3, f"loss above {REFERENCE}'s")
    heads.append(heads[3])
    print(f"| merger | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")

    def means(name: str, tasks: tuple[str, ...]) -> np.ndarray:
        """[seeds, scores]; empty where there is nothing."""
        rows = [[run.get(name, {}).get(t) for t in tasks] for run in runs]
        there = all(score is not None for row in rows for score in row)
        return np.array(rows, float).mean(1) if there else np.empty((0, 3))

    for name in runs[0]:
        cells = []
        for tasks in (TASKS, OTHERS):
            mine, other = means(name, tasks), means(REFERENCE, tasks)
            cells += [interval(mine[:, i].tolist()) if len(mine) else "" for i in range(3)]
            both = len(mine) and len(other) and name != REFERENCE
            cells.append(interval((mine - other)[:, 2].tolist()) if both else "")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Do one seed, or print the tables."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        seed = int(sys.argv[1])
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / f"seed{seed}.json").write_text(json.dumps(study(seed), indent=1))
        return
    found = [json.loads(file.read_text()) for file in sorted(OUT.glob("seed*.json"))]
    for setting in found[0]:
        print(f"\n{setting}, {len(found)} seeds\n")
        table([run[setting] for run in found])


if __name__ == "__main__":
    main()
