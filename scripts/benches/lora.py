"""What merging LoRA adapters costs, against the direct way; and many adapters over one base.

Usage: scripts/bench lora [--modules N] [--sklearn N]

Processor time of one thread, so that neighbours on the machine count little; scikit-learn's OpenMP
is held to one thread too, since waiting threads spin, which counts as work. It is run on some
modules and scaled to all; its inertia is compared on those same modules.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

WIDTH, CLIENTS, RANK, CLUSTERS = 4096, 10, 8, 8


def timed(work: Callable[[], Any], times: int = 1) -> tuple[float, Any]:
    """Best processor time in seconds, and the result."""
    best, result = float("inf"), None
    for _ in range(times):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return best, result


def noise(*shape: int, seed: int) -> torch.Tensor:
    """Gaussian numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lego(modules: int, sample: int) -> None:
    """LoRA-LEGO's clustering: `modules` pools of CLIENTS * RANK units of 2 * WIDTH numbers."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    from fedsim.core.lora import Factors, Lego
    from fedsim.core.lora import lego as merge
    from fedsim.core.lora.kmeans import kmeans

    pools = [noise(CLIENTS * RANK, 2 * WIDTH, seed=m) for m in range(modules)]

    def ours(n_init: int) -> Any:
        gram = torch.stack([(x @ x.T).double() for x in pools])
        weight = torch.ones(gram.shape[:2], dtype=torch.float64)
        return kmeans(gram, weight, CLUSTERS, n_init=n_init)

    def direct() -> list[float]:
        return [
            KMeans(CLUSTERS, n_init=10, random_state=0).fit(x.numpy()).inertia_
            for x in pools[:sample]
        ]

    with threadpool_limits(1):
        slow, inertias = timed(direct)
    slow *= modules / sample
    dim = CLIENTS * RANK
    print(f"k-means, {modules} modules, M = {dim}, d = {2 * WIDTH}, k = {CLUSTERS}")
    print(f"{'':34}{'seconds':>10}{'times':>8}{'inertia':>14}")
    total = sum(inertias) / sample
    label = f"scikit-learn, n_init 10 ({sample} modules)"
    print(f"{label:34}{slow:10.3f}{1:8}{total:14.1f}")
    for n_init in (10, 20, 40):
        fast, found = timed(lambda n=n_init: ours(n), 3)
        mine = float(found.inertia[:sample].mean())
        print(f"{f'Gram space, n_init {n_init}':34}{fast:10.3f}{slow / fast:8.0f}{mine:14.1f}")

    adapters = [
        {
            f"m{m}": Factors(
                pools[m][c * RANK : (c + 1) * RANK, :WIDTH],
                pools[m][c * RANK : (c + 1) * RANK, WIDTH:].T,
            )
            for m in range(modules)
        }
        for c in range(CLIENTS)
    ]
    whole, _ = timed(lambda: merge(adapters, Lego(rank=CLUSTERS)))
    print(f"{'the whole merge, factors to factors':34}{whole:9.3f}{slow / whole:8.0f}")


def flexlora(width: int = 2048) -> None:
    """FlexLoRA's decomposition at width x width and R = 80."""
    from fedsim.core.lora import Factors, flexlora, truncated

    adapters = [
        {"m": Factors(noise(RANK, width, seed=c), noise(width, RANK, seed=99 + c))}
        for c in range(CLIENTS)
    ]
    mean = sum(a["m"].delta() for a in adapters) / CLIENTS

    slow, dense = timed(lambda: torch.linalg.svd(mean, full_matrices=False))
    fast, found = timed(lambda: flexlora(adapters), 5)
    exact = sum(a["m"].to(torch.float64).delta() for a in adapters) / CLIENTS
    best = cut(*torch.linalg.svd(exact, full_matrices=False))
    print(f"\nFlexLoRA, {width} x {width}, R = {CLIENTS * RANK}, truncated to {RANK}")
    print(f"{'':34}{'seconds':>10}{'times':>8}{'difference':>14}")
    for name, seconds, merged in (
        ("dense SVD, float32", slow, cut(*dense)),
        ("compact, from the factors", fast, truncated(found["m"], RANK).delta()),
    ):
        gap = float((merged - best).norm() / best.norm())
        print(f"{name:34}{seconds:10.3f}{slow / seconds:8.0f}{gap:14.1e}")
    print("difference: relative, from the dense SVD in float64")


def host(width: int = 256, layers: int = 2, adapters: int = 8, length: int = 32) -> None:
    """Several adapters over one base forward pass, against one pass after another."""
    from fedsim.core.lora import Factors
    from fedsim.models.adapters import PeftAdapter
    from fedsim.models.host import Host
    from fedsim.models.text import CharGPT

    worn = Host(CharGPT(100, length, width, layers, 4))
    names = {"attend": (width, 3 * width), "contract": (4 * width, width)}
    many = [
        PeftAdapter(
            {
                f"blocks.{i}.{name}": Factors(
                    noise(RANK, n, seed=c + 7 * i), noise(m, RANK, seed=50 + c + 7 * i)
                )
                for i in range(layers)
                for name, (n, m) in names.items()
            }
        )
        for c in range(adapters)
    ]
    print(f"\n{adapters} adapters of rank {RANK} over a GPT of width {width}, length {length}")
    print(f"{'examples of each':34}{'one by one':>12}{'together':>10}{'times':>8}")
    for examples in (1, 4, 16, 64):
        x = torch.arange(examples * length).view(examples, length) % 100
        slow, one = timed(lambda x=x: worn.outputs(many, x, together=False), 5)
        fast, two = timed(lambda x=x: worn.outputs(many, x, together=True), 5)
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-2 * float(one.abs().max()))
        print(f"{examples:<34}{slow:12.4f}{fast:10.4f}{slow / fast:8.2f}")


def cut(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor) -> torch.Tensor:
    """The best approximation of rank RANK."""
    return u[:, :RANK] * s[:RANK] @ vt[:RANK]


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--sklearn", type=int, default=8, help="modules for scikit-learn")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    lego(options.modules, min(options.sklearn, options.modules))
    flexlora()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    inputs = options.modules * 80 * 8192 * 4 / 2**20
    print(f"\npeak memory {peak:.0f} MB, of which inputs {inputs:.0f}")
    host()


if __name__ == "__main__":
    main()
