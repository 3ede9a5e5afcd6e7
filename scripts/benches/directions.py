"""Seeded directions: w += sum_k c_k z(seed_k), against the loops of FedKSeed and Ferret.

Every way to do it costs the same per seed, so each is timed on as many seeds as fit a short
measurement (the numpy reference also on fewer parameters) and scaled to K; the column `timed` says
what was timed. Runners take turns, so that a busy machine disturbs all alike.

    official   the papers' code: reseed, draw a whole tensor, add it with two temporaries. Ferret's
               server (trunc_normal_, isfinite, clip) for `uniform` and `truncated`; FedKSeed's
               Gaussian loop also for the signs, which are there to replace it
    torch      in place: one buffer, an explicit generator, add_(z, alpha); the same for the signs
    numpy      the reference back end
    numba      the numba back end on one thread
    fedsim     what `combine` does by itself: the chosen back end, all threads
    floor      the time that the Philox words alone take on all threads
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedsim.core import directions

GROUPS = (("gaussian", "rademacher", "rademacher32"), ("uniform", "truncated"))
"""Bases that the papers' code serves with one loop, and which are timed against it together."""
SIZES = (1_000_000, 10_000_000, 135_000_000)
SEEDS = (1024, 4096)
RUNNERS = ("official", "torch", "numpy", "numba", "fedsim")
TENSOR = 1 << 22
"""Parameters of one tensor of the model, at most: a 2048 x 2048 matrix."""
SMALL = {"numpy": 1 << 18, "numba": 10_000_000}
"""Parameters that a slow runner is timed on, at most."""


class Timing(NamedTuple):
    """Seconds per draw of one runner, turn by turn, and what was timed."""

    per_draw: list[float]
    size: int
    seeds: int

    def seconds(self, draws: float) -> tuple[float, float, float]:
        """Median, least and most for that many draws."""
        x = self.per_draw
        return statistics.median(x) * draws, min(x) * draws, max(x) * draws


class Way(NamedTuple):
    """One runner on one basis: a call, its parameters, and the seeds it takes at a time."""

    call: Callable[..., None]
    size: int
    least: int = 1
    group: int = 1


Timings = dict[tuple[str, str], Timing]


def official(basis: str, model: list[torch.Tensor], seeds: np.ndarray, c: np.ndarray) -> None:
    """The loops of the papers' code."""
    a = sum(w.numel() for w in model) ** -0.5
    for seed, x in zip(seeds.tolist(), c.tolist(), strict=True):
        torch.manual_seed(seed % 2**63)
        for w in model:
            if basis in ("uniform", "truncated"):
                z = torch.nn.init.trunc_normal_(torch.empty_like(w), 0.0, 1.0, -a, a) * x
                if torch.isfinite(z).all():
                    w.sub_(-1.0 * (z * torch.clamp(10.0 / (z.norm() + 1e-8), max=1.0)))
            else:
                z = torch.normal(mean=0.0, std=1.0, size=w.size(), dtype=w.dtype)
                w.sub_(-1.0 * (x * z))


def in_place(
    basis: str, model: list[torch.Tensor], seeds: np.ndarray, c: np.ndarray, buffer: torch.Tensor
) -> None:
    """The best that torch's own generator allows without cutting tensors in chunks."""
    for seed, x in zip(seeds.tolist(), c.tolist(), strict=True):
        generator = torch.Generator().manual_seed(seed % 2**63)
        for w in model:
            z = buffer[: w.numel()]
            if basis in ("uniform", "truncated"):
                z.uniform_(-1.0, 1.0, generator=generator)
            else:
                z.normal_(generator=generator)
            w.add_(z, alpha=x)


def ways(bases: Sequence[str], model: list[torch.Tensor]) -> dict[tuple[str, str], Way]:
    """(Runner, basis): how to call it with seeds and coefficients, and its parameters."""
    size = sum(w.numel() for w in model)
    buffer = torch.empty(min(TENSOR, size))
    found = {
        ("official", bases[0]): Way(partial(official, bases[0], model), size),
        ("torch", bases[0]): Way(partial(in_place, bases[0], model, buffer=buffer), size),
    }
    for basis in bases:
        for runner, options in (("numpy", {}), ("numba", {"threads": 1}), ("fedsim", {})):
            if runner == "numba" and directions.backend() != "numba":
                continue
            d = min(size, SMALL.get(runner, size))
            kind = {} if runner == "fedsim" else {"backend": runner}
            w = model if d == size else torch.zeros(d)
            call = partial(directions.combine, w, basis=basis, **kind, **options)
            # Enough seeds that going through memory once is shared, as it is among K of them.
            least = 1 if runner == "numpy" else 32 if basis.startswith("rademacher") else 8
            found[runner, basis] = Way(call, d, least, 32 if basis == "rademacher32" else 1)
    return found


def measure(bases: Sequence[str], size: int, budget: float, repeats: int) -> Timings:
    """Time every runner and basis on a model of `size`, in turn, `repeats` times."""
    rest = [TENSOR] * (size // TENSOR) + ([size % TENSOR] if size % TENSOR else [])
    model = [torch.zeros(n) for n in rest]
    pool = directions.pool(1, max(SEEDS))
    c = np.random.default_rng(1).standard_normal(len(pool)) * 1e-4
    timings: Timings = {}
    calls = ways(bases, model)
    for key, (call, d, least, group) in calls.items():
        n = max(least, group)
        once = clock(call, pool[:n], c[:n])  # compiles, and warms up
        if once < 2 * budget:
            once = clock(call, pool[:n], c[:n])
        count = int(n * budget / once) // group * group
        timings[key] = Timing([], d, max(n, min(count, len(pool))))
    for _ in range(repeats):
        for key, (per_draw, d, n) in timings.items():
            per_draw.append(clock(calls[key].call, pool[:n], c[:n]) / (n * d))
    for runner in ("official", "torch"):
        timings |= {(runner, basis): timings[runner, bases[0]] for basis in bases}
    return timings


def clock(call: Callable[..., object], *arguments: np.ndarray) -> float:
    """Seconds that the call takes, by the clock on the wall or (--busy) of this process."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    call(*arguments)
    return now() - start


def floor(threads: int) -> float | None:
    """Seconds per Philox word with all threads at it, nothing else done; None without numba."""
    if directions.backend() != "numba":
        return None
    from numba import njit

    from fedsim.core.directions.compiled import philox

    @njit(nogil=True)
    def draw(count: int, words: np.ndarray) -> None:
        for seed in range(count):
            philox(np.uint64(seed), np.uint64(0), 512, np.uint64(0), np.uint64(1), words)

    buffers, count = [np.zeros((2, 512), dtype=np.uint64) for _ in range(threads)], 100_000
    draw(1, buffers[0])
    best = float("inf")
    with ThreadPoolExecutor(threads) as workers:
        for _ in range(3):
            best = min(best, clock(lambda: list(workers.map(partial(draw, count), buffers))))
    return best / (2048 * count * threads)


def extra_memory(size: int) -> float | None:
    """Peak resident memory of `combine` over that before, in bytes; None where Linux won't say."""
    seeds, c = directions.pool(1, 256), np.full(256, 1e-4)
    w = torch.zeros(size)
    directions.combine(w, seeds[:8], c[:8])
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = status("VmRSS")
        directions.combine(w, seeds, c)
        return status("VmHWM") - before
    except (OSError, KeyError):
        return None


def cores() -> str:
    """How many processors, and whether they have AVX-512."""
    text = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else ""
    return f"{os.cpu_count()} {'AVX-512 ' if 'avx512f' in text else ''}".strip()


def status(field: str) -> float:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024.0 * int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def table(size: int, basis: str, timings: Timings, word: float | None) -> Iterator[str]:
    """Lines of the table for one basis and size."""
    official = timings["official", basis].seconds(1)[0]
    words = 1 / 32 if basis.startswith("rademacher") else 1
    for runner in RUNNERS:
        if (runner, basis) not in timings:
            continue
        timing = timings[runner, basis]
        middle, low, high = timing.seconds(1)
        taken = "".join(f"{seconds(middle * size * k):>11}" for k in SEEDS)
        bound = "-" if word is None else f"{middle / (word * words):.1f}"
        yield (
            f"{basis:13}{size:>9.3g}  {runner:9}{1e-9 / middle:9.4f}{middle * 1e6:13.2e}"
            f"  {low / middle:.2f}-{high / middle:.2f}{taken}{official / middle:10.1f}{bound:>8}"
            f"  {timing.seeds} x {timing.size:.3g}"
        )


def seconds(x: float) -> str:
    """Seconds with three digits."""
    return f"{x:.3g} s" if x < 1e5 else f"{x:.1e} s"


HEAD = (
    f"{'basis':13}{'d':>9}  {'runner':9}{'Gdraw/s':>9}{'s/seed/1e6':>13}  {'range':9}"
    f"{'K=1024':>11}{'K=4096':>11}{'official/':>10}{'/floor':>8}  timed (seeds x d)"
)


def main(argv: list[str]) -> int:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench directions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--quick", action="store_true", help="a million parameters, once: seconds")
    parser.add_argument(
        "--busy",
        action="store_true",
        help="one thread each, and processor time: for a machine that others use at the same time",
    )
    options = parser.parse_args(argv)
    if options.busy:
        torch.set_num_threads(1)
    threads = torch.get_num_threads()
    word = floor(threads)
    print(
        f"fedsim runs {directions.backend()} on {threads} threads"
        + ("" if word is None else f"; Philox alone makes {1e-9 / word:.2f} Gwords/s (the floor)")
        + f"; {cores()} cores, load {os.getloadavg()[0]:.1f} before"
        + (", processor time" if threads == 1 else "")
    )
    print(HEAD)
    rows: list[dict[str, Any]] = []
    for size in SIZES[:1] if options.quick else SIZES:
        for bases in GROUPS:
            timings = measure(bases, size, *((0.03, 1) if options.quick else (0.25, 3)))
            for basis in bases:
                print(*table(size, basis, timings, word), sep="\n", flush=True)
            rows += [
                {"basis": basis, "runner": runner, "d": size, "K": k}
                | dict(
                    zip(("seconds", "seconds_min", "seconds_max"), t.seconds(size * k), strict=True)
                )
                | {"timed_seeds": t.seeds, "timed_d": t.size, "repeats": len(t.per_draw)}
                for (runner, basis), t in timings.items()
                for k in SEEDS
            ]
    print("seconds for K seeds are scaled from the seeds timed: cost is linear in seeds")
    if not options.quick:
        whole(rows)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def whole(rows: list[dict[str, Any]]) -> None:
    """Check the scaling against one whole run, and measure memory."""
    d, k = 10_000_000, 1024
    w, seeds = torch.zeros(d), directions.pool(1, k)
    taken = clock(directions.combine, w, seeds, np.full(k, 1e-4))
    scaled = next(
        r["seconds"]
        for r in rows
        if (r["basis"], r["runner"], r["d"], r["K"]) == ("gaussian", "fedsim", d, k)
    )
    print(f"gaussian, d = 1e7, K = 1024 as a whole: {taken:.2f} s ({taken / scaled:.2f} x scaled)")
    extra = extra_memory(d)
    if extra is not None:
        print(f"extra memory at d = 1e7: {extra / 1e3:.0f} kB, {extra / (4 * d):.2%} of the model")
