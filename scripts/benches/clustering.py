"""Time and memory of clustering N clients, by what is clustered and how.

Usage: scripts/bench clustering [--most N]

Signatures are float32, Gaussian around ten centres: "full" as long as a small model, "last layer"
as long as its last layer, "sketch" 512 or 64 numbers. Times are processor seconds of one thread,
so that neighbours on the machine count little. FasterPAM needs the package kmedoids, is told the
number of clusters and starts at random. Peak memory is that of the process so far, before it.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from scipy.spatial.distance import squareform

from fedsim.core import clustering

GROUPS, MODEL = 10, 25_450
LENGTHS = {"full": MODEL, "last layer": 330, "sketch of 512": 512, "sketch of 64": 64}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=int, default=10_000)
    most = parser.parse_args(argv).most
    torch.set_num_threads(1)
    print("| N | signature | distances, s | Ward, s | ARI | peak, MB | FasterPAM, s | ARI |")
    print("| --: | :-- | --: | --: | --: | --: | --: | --: |")
    for count in (n for n in (100, 1_000, 2_000, 5_000, 10_000) if n <= most):
        for name, length in reversed(LENGTHS.items()):  # small ones first: memory only grows
            print(row(count, name, length), flush=True)
    for name, length in LENGTHS.items():
        if name.startswith("sketch"):
            vector = torch.zeros(MODEL)
            clustering.sketch(vector, length, 0)
            start = time.process_time()
            clustering.sketch(vector, length, 1)
            print(f"\n{name}, of {MODEL:,} numbers: {time.process_time() - start:.4f} s a client")


def row(count: int, name: str, length: int) -> str:
    """One row of the table."""
    draw = np.random.default_rng(count)
    truth = np.arange(count) % GROUPS
    points = draw.standard_normal((count, length), dtype=np.float32)
    for group, centre in enumerate(draw.standard_normal((GROUPS, length), dtype=np.float32)):
        points[group::GROUPS] += centre
    start = time.process_time()
    pairs = clustering.distances(points)
    between = time.process_time()
    found = clustering.from_distances(np.arange(count), pairs, clustering.Rule())
    end = time.process_time()
    score, _ = clustering.agreement(found.labels, truth)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    medoids = "- | -"
    if find_spec("kmedoids"):
        import kmedoids

        square = squareform(pairs.astype(np.float32))
        begun = time.process_time()
        other = kmedoids.fasterpam(square, GROUPS, random_state=0)
        taken = time.process_time() - begun
        medoids = f"{taken:.2f} | {clustering.agreement(other.labels, truth)[0]:.3f}"
    return (
        f"| {count:,} | {name} | {between - start:.2f} | {end - between:.2f} | {score:.3f} "
        f"| {peak:.0f} | {medoids} |"
    )


if __name__ == "__main__":
    main()
