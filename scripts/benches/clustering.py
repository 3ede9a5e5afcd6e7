"""Time and memory of clustering N clients, by what is clustered and how.

    python scripts/benches/clustering.py [--most N]

Signatures are Gaussian around ten centres: "full" as long as a small model, "last layer" as long
as its last layer, "sketch" 64 numbers; making the sketches is timed apart. FasterPAM needs the
package kmedoids and is told the number of clusters. Peak memory is that of the process so far.
"""

from __future__ import annotations

import argparse
import resource
import time
from importlib.util import find_spec

import numpy as np
from scipy.spatial.distance import squareform

from fedsim.core import clustering

GROUPS = 10
LENGTHS = {"full": 25_450, "last layer": 330, "sketch": 64}
LARGEST_FULL = 2_000
"""More clients than that are not clustered by whole models: they would not fit into memory."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--most", type=int, default=10_000)
    most = parser.parse_args().most
    print("| N | signature | distances, s | Ward, s | FasterPAM, s | ARI Ward | peak, MB |")
    print("| --: | :-- | --: | --: | --: | --: | --: |")
    for count in (n for n in (100, 1_000, 2_000, 5_000, 10_000) if n <= most):
        for name, length in LENGTHS.items():
            if name == "full" and count > LARGEST_FULL:
                continue
            print(row(count, name, length), flush=True)


def row(count: int, name: str, length: int) -> str:
    """One row of the table."""
    draw = np.random.default_rng(count)
    truth = np.arange(count) % GROUPS
    points = draw.normal(size=(GROUPS, length))[truth] + draw.normal(size=(count, length))
    start = time.perf_counter()
    pairs = clustering.distances(points)
    between = time.perf_counter()
    found = clustering.from_distances(np.arange(count), pairs, clustering.Rule())
    end = time.perf_counter()
    score, _ = clustering.agreement(found.labels, truth)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    medoids = "-"
    if find_spec("kmedoids"):
        import kmedoids

        square = squareform(pairs.astype(np.float32))
        begun = time.perf_counter()
        kmedoids.fasterpam(square, GROUPS, random_state=0)
        medoids = f"{time.perf_counter() - begun:.2f}"
    return (
        f"| {count} | {name} | {between - start:.2f} | {end - between:.2f} | {medoids} "
        f"| {score:.3f} | {peak:.0f} |"
    )


if __name__ == "__main__":
    main()
