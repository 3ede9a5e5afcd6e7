"""Memory of a language model that is evaluated, and that is tuned without gradients or with them.

Every row is a process of its own on the same model and minibatches: evaluation alone, then a
round of each strategy with one client, and of FedKSeed with many. Peak resident memory is taken
from the kernel, reset once the model is loaded; `over libraries` is what is above the process
before it loaded anything. The model's bytes are hashed before and after: clients share one copy.

Usage: scripts/bench memory [--model FILE.gguf|FOLDER|ID] [--clients N] [--batch N] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMOLLM2 = "~/.cache/fedsim/models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Where scripts/get-model smollm2-135m puts it."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedkseed": {"name": "fedkseed", "pool": 1024, "steps": 1, "lr": 1e-6, "eps": 1e-3},
    "ferret": {"name": "ferret", "bases": 16},
    "fedit": {"name": "fedavg", "model": {"peft": "lora"}},
    "fedavg": {"name": "fedavg"},
}


def status(field: str) -> int:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) // 1024


def digest(flat: Any) -> str:
    """SHA-256 of a vector, read in pieces."""
    found = hashlib.sha256()
    for piece in flat.split(1 << 22):
        found.update(piece.numpy().tobytes())
    return found.hexdigest()


def copies(initial: Any) -> int:
    """How many vectors of the model's size are in this process's memory; initial values, which
    lie in a file, apart.
    """
    import torch

    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if torch.is_tensor(t)
    }
    held.pop(initial.untyped_storage().data_ptr(), None)
    return sum(nbytes >= initial.nbytes for nbytes in held.values())


def child(what: str, model: str, clients: int, batch: int) -> dict[str, Any]:
    """Measure one row in this process."""
    import torch
    import transformers

    from fedsim.client_app import ProgramApp
    from fedsim.config import parse
    from fedsim.federation import Federation
    from fedsim.runner import build_strategy
    from fedsim.runtime.grid import LocalGrid
    from fedsim.runtime.work import Environment

    torch.set_num_threads(1)
    assert transformers.LlamaForCausalLM  # imported now: libraries are not the model's memory
    libraries = status("VmRSS")
    dataset = {"name": "instruction_tasks", "tokenizer": model, "length": 24, "examples": 8,
               "tasks": 51, "heldout_tasks": 1}  # fmt: skip
    experiment = parse(
        {
            "experiment": {"name": "memory", "seeds": [0], "rounds": 1},
            "data": {"dataset": dataset, "partition": "natural"},
            "model": {"name": "hf_causal_lm", "path": model},
            "cohort": {"size": clients},
            "train": {"batch_size": batch, "max_steps": 1, "lr": 1e-4},
            "evaluate": {"clients": False, "batch_size": batch, "metric": "loss"},
            "strategy": [STRATEGIES.get(what, {"name": "fedavg"})],
        }
    )
    (entry,) = experiment.strategy
    env = Environment.of(experiment, 0, entry)
    grid = LocalGrid(ProgramApp(env), env.data.num_clients)
    fed = Federation(experiment, entry, build_strategy(entry), 0, grid, env)
    resident = env.model.resident
    before = digest(resident.flat)
    gc.collect()
    loaded = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if what == "evaluation":
        fed.central.loss_of(type(env.model.initial())(env.model.layout, resident.flat))
    else:
        fed.advance(fed.begin())
    peak, after, held = status("VmHWM"), status("VmRSS"), copies(env.model.initial().flat)
    resident.restore(b"initial", lambda flat, held: None)
    return {
        "what": what,
        "clients": 0 if what == "evaluation" else clients,
        "libraries": libraries,
        "loaded": loaded,
        "peak": peak,
        "after": after,
        "copies": held,
        "unchanged": digest(resident.flat) == before,
    }


def main(argv: Sequence[str]) -> int:
    """Run every row, print the table, write the rows."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.row:
        found = child(options.row, options.model, options.clients, options.batch)
        print("ROW", json.dumps(found))
        return 0
    rows = []
    plan = [("evaluation", 1), ("fedkseed", 1), ("fedkseed", options.clients)]
    plan += [(name, 1) for name in STRATEGIES if name != "fedkseed"]
    print(f"{'MiB':12}{'clients':>8}{'loaded':>8}{'peak':>8}{'/evaluation':>12}"
          f"{'over libraries':>16}{'/evaluation':>12}{'copies':>8}{'hash':>6}")  # fmt: skip
    for what, clients in plan:
        told = ["--row", what, "--model", options.model, "--batch", str(options.batch)]
        command = [sys.executable, str(Path(__file__).parents[1] / "bench"), "memory", *told]
        ran = subprocess.run(
            [*command, "--clients", str(clients)], capture_output=True, text=True, check=False
        )
        line = next((x for x in ran.stdout.splitlines() if x.startswith("ROW ")), None)
        if line is None:
            print(ran.stderr[-2000:], file=sys.stderr)
            return 1
        row = json.loads(line.removeprefix("ROW "))
        rows.append(row)
        first = rows[0]
        net = row["peak"] - row["libraries"]
        base = first["peak"] - first["libraries"]
        cells = (
            f"{what:12}{row['clients']:8}{row['loaded']:8}{row['peak']:8}",
            f"{row['peak'] / first['peak']:12.3f}{net:16}{net / base:12.3f}",
            f"{row['copies']:8}{'same' if row['unchanged'] else 'OTHER':>6}",
        )
        print("".join(cells), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0
