"""Training-free mergers of adapters that were trained apart: the baselines of LoRA-LEGO."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsim.core.errors import require
from fedsim.core.lora.factors import (
    Adapter,
    Factors,
    Pool,
    compact_svd,
    concatenated,
    pools,
    truncated,
)
from fedsim.core.rng import SERVER, torch_generator

Weights = Sequence[float] | None


def _fitted(factors: Factors, rank: int | None) -> Factors:
    """The best approximation of that rank; None: as it is."""
    if rank is None or rank >= factors.rank:
        return factors
    u, s, vt = compact_svd(factors)
    return truncated(Factors(vt, u * s), rank)


def task_arithmetic(
    adapters: Sequence[Adapter],
    weights: Weights = None,
    coefficient: float = 1.0,
    rank: int | None = None,
) -> dict[str, Factors]:
    """Task arithmetic: the weighted sum of the updates.

    Ilharco et al., *Editing Models with Task Arithmetic*, ICLR 2023: ``c * sum_i w_i dW_i`` (not
    normalised: `weights` None means ones). Exact by concatenation, of the sum of the ranks.

    Args:
        adapters: of any ranks and scalings.
        weights: of the updates.
        coefficient: c, the paper's lambda, for all of them.
        rank: None: exact; else the best approximation of that rank.
    """
    given = list(weights) if weights is not None else [1.0] * len(adapters)
    require(len(given) == len(adapters), "weights", given, f"{len(adapters)} numbers")
    found = {}
    for p in pools(adapters):
        whole = concatenated(p.factors, [coefficient * given[i] for i in p.members])
        found[p.name] = _fitted(whole, rank).to(p.dtype)
    return found


def ensemble(
    adapters: Sequence[Adapter], weights: Weights = None, rank: int | None = None
) -> dict[str, Factors]:
    """Uniform ensemble: the mean of what the adapters' layers put out, ``sum_i p_i dW_i x``.

    It averages layer by layer, which for one linear layer is the ensemble of its outputs. The
    ensemble of whole networks averages their last outputs and is no adapter.

    Args:
        adapters: of any ranks and scalings.
        weights: of the adapters; None: all alike.
        rank: None: exact; else the best approximation of that rank.
    """
    return {
        p.name: _fitted(concatenated(p.factors, p.weights), rank).to(p.dtype)
        for p in pools(adapters, weights)
    }


def _merge(
    adapters: Sequence[Adapter],
    weights: Weights,
    space: str,
    rank: int | None,
    combine: Callable[[Pool, Tensor, Tensor], Tensor],
) -> dict[str, Factors]:
    """Apply an entrywise rule in one of two spaces.

    ``"factors"``: to A and to B, each adapter's times ``sqrt(w_i s_i)`` (as peft does; equal ranks
    only). ``"product"``: to the dense updates times ``w_i``, one module at a time; the result is
    brought to `rank` (None: the largest of the adapters) by its singular values.
    """
    require(space in ("factors", "product"), "space", space, "factors or product")
    given = list(weights) if weights is not None else [1.0] * len(adapters)
    require(len(given) == len(adapters), "weights", given, f"{len(adapters)} numbers")
    found = {}
    for p in pools(adapters):
        chosen = torch.tensor([given[i] for i in p.members], dtype=p.factors[0].a.dtype)
        if space == "product":
            stack = torch.stack([f.delta() for f in p.factors])
            u, s, vt = torch.linalg.svd(combine(p, stack, chosen), full_matrices=False)
            whole = Factors(vt, u * s)
            merged = truncated(whole, rank or max(f.rank for f in p.factors))
        else:
            require(rank is None, "rank", rank, "left out in the space of factors")
            p_rank = {f.rank for f in p.factors}
            require(len(p_rank) == 1, f"ranks of {p.name}", sorted(p_rank), "equal")
            require(bool((chosen >= 0).all()), "weights", given, "0 or above in this space")
            scaled = (chosen * chosen.new_tensor([f.scaling for f in p.factors])).sqrt()
            merged = Factors(
                combine(p, torch.stack([f.a for f in p.factors]), scaled),
                combine(p, torch.stack([f.b for f in p.factors]), scaled),
            )
        found[p.name] = merged.to(p.dtype)
    return found


def _largest(stack: Tensor, density: float) -> Tensor:
    """Each of the stacked tensors with all but its largest entries set to zero."""
    flat = stack.reshape(len(stack), -1)
    keep = int(density * flat.shape[1])
    kept = torch.zeros_like(flat)
    places = flat.abs().topk(keep, 1).indices
    return kept.scatter(1, places, flat.gather(1, places)).view_as(stack)


def _elected(stack: Tensor, weights: Tensor) -> Tensor:
    """Sum over those of an entry that have the elected sign, divided by how many are not zero."""
    positive = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = torch.sign(stack) == positive
    shaped = weights.view(-1, *[1] * (stack.dim() - 1))
    return (stack * shaped * agree).sum(0) / agree.sum(0).clamp_min(1)


def ties(
    adapters: Sequence[Adapter],
    weights: Weights = None,
    density: float = 0.2,
    space: str = "factors",
    rank: int | None = None,
) -> dict[str, Factors]:
    """TIES: trim, elect a sign for each entry, average those that agree.

    Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, NeurIPS 2023: keep
    the `density` largest entries of each, take the sign with the larger total magnitude, and the
    mean of the entries with that sign. `weights` (None: ones) multiply the updates, as in peft.

    Args:
        adapters: to merge.
        weights: of the updates.
        density: share of entries that is kept; the paper's 0.2.
        space: ``"factors"`` trims A and B as peft does; ``"product"`` the dense updates, as the
            paper does with whole models.
        rank: of the result in the space of products; None: the largest of the adapters.
    """
    require(0 < density <= 1, "density", density, "above 0 and at most 1")

    def combine(pool: Pool, stack: Tensor, chosen: Tensor) -> Tensor:
        return _elected(_largest(stack, density), chosen)

    return _merge(adapters, weights, space, rank, combine)


def dare(
    adapters: Sequence[Adapter],
    weights: Weights = None,
    density: float = 0.5,
    space: str = "factors",
    rank: int | None = None,
    seed: int = 0,
    elect: bool = False,
) -> dict[str, Factors]:
    """DARE: drop entries at random and rescale the rest, then sum.

    Yu et al., *Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
    Free Lunch*, ICML 2024: every entry survives with probability `density` and is divided by it,
    so that the expectation stays. Then task arithmetic, or TIES' election of signs.

    Args:
        adapters: to merge.
        weights: of the updates; None: ones.
        density: chance to survive; 1 changes nothing.
        space: as in `ties`.
        rank: as in `ties`.
        seed: of the draws, one stream for each module.
        elect: elect signs instead of summing.
    """
    require(0 < density <= 1, "density", density, "above 0 and at most 1")
    draws: dict[str, torch.Generator] = {}

    def combine(pool: Pool, stack: Tensor, chosen: Tensor) -> Tensor:
        new = torch_generator(seed, 0, SERVER, f"dare {pool.name}")
        draw = draws.setdefault(pool.name, new)
        alive = torch.rand(stack.shape, generator=draw) < density
        stack = stack * alive / density
        if elect:
            return _elected(stack, chosen)
        return torch.einsum("i,i...->...", chosen, stack)

    return _merge(adapters, weights, space, rank, combine)
