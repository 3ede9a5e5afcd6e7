"""Seconds and memory of one forward pass of MiniLM-L6 or SmolLM2, whole and physically pruned.

    scripts/bench pruning [--model minilm-l6|smollm2-135m] [--json FILE]

Heads and channels of every layer are removed, equally many each, by magnitude, and sliced out of
the matrices (`fedsim.models.pruning.sliced`). Interleaved, medians and ranges. The models are
those of `scripts/get-model`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

SHARES = (0.0, 0.3, 0.5, 0.7)
REPEATS = 15


def load(name: str) -> Any:
    """A model from the cache, as a function from tokens to outputs, and its vocabulary."""
    import torch
    import transformers

    place = (
        Path(os.environ.get("FEDSIM_CACHE", Path.home() / ".cache" / "fedsim")) / "models" / name
    )
    if not place.exists():
        raise SystemExit(f"{place} is not there; run: scripts/get-model {name}")

    class Outputs(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.inner(tokens)[0]

    if name == "minilm-l6":
        return Outputs(transformers.AutoModel.from_pretrained(str(place)).eval())
    (file,) = place.glob("*.gguf")
    return Outputs(
        transformers.AutoModelForCausalLM.from_pretrained(
            str(place), gguf_file=file.name, dtype=torch.float32, use_cache=False
        ).eval()
    )


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench pruning", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="minilm-l6", choices=["minilm-l6", "smollm2-135m"])
    parser.add_argument("--tokens", type=int, default=128, help="in a text (default: 128)")
    parser.add_argument("--batch", type=int, default=8, help="texts (default: 8)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    given = parser.parse_args(argv)

    import torch

    from fedsim.core.structure import lowered
    from fedsim.models.pruning import gated, sliced

    module = gated(load(given.model))
    found = module.structures
    weights = dict(module.named_parameters())
    scores = {}
    for s in found.items:
        path, index = s.columns
        scores[s.name] = weights[found.weights[path]].detach().abs().sum(0)[index].sum(1)
    models = {}
    for share in SHARES:
        kept = lowered(found.whole(), scores, share, found.items)
        models[share] = sliced(module, kept), found.left(kept)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1000, 20000, (given.batch, given.tokens), generator=generator)
    seconds: dict[float, list[float]] = {share: [] for share in SHARES}
    with torch.no_grad():
        for number in range(REPEATS + 1):
            for share, (small, _) in models.items():
                start = time.perf_counter()
                small(x)
                if number:  # the first pass warms up
                    seconds[share].append(time.perf_counter() - start)
    whole = statistics.median(seconds[0.0])
    rows = []
    print(
        f"{given.model}: {given.batch} texts of {given.tokens} tokens, "
        f"{torch.get_num_threads()} threads"
    )
    print(
        f"{'removed':>8} {'weights left':>13} {'all MB':>8} {'ms':>8} {'range':>15} {'of whole':>9}"
    )
    for share, (small, left) in models.items():
        times = sorted(1e3 * s for s in seconds[share])
        size = sum(p.numel() * p.element_size() for p in small.parameters()) / 1e6
        median = statistics.median(times)
        print(
            f"{share:8.0%} {left:13.1%} {size:8.1f} {median:8.1f} "
            f"{times[0]:7.1f}-{times[-1]:<7.1f} {median / whole / 1e3:9.1%}"
        )
        rows.append({"removed": share, "left": left, "mb": size, "seconds": median / 1e3})
    if given.json:
        Path(given.json).write_text(
            json.dumps({"model": given.model, "rows": rows}, indent=2) + "\n"
        )
    return 0
