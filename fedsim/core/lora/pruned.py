"""Adapters of pruned models: cut to what a client has left, put back into place, aggregated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsim.core.errors import require
from fedsim.core.lora.factors import Adapter, Factors, truncated
from fedsim.core.lora.federated import fedit, flexlora
from fedsim.core.lora.lego import Lego, lego
from fedsim.core.model import ModelInfo
from fedsim.core.parts import part_of
from fedsim.core.records import FlatRecord, Layout
from fedsim.core.structure import Kept

Sides = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Outputs and inputs of layers that are left, by path (`Structures.sides`)."""
Pairs = Mapping[str, tuple[str, str]]
"""Names of A and B by path (`fedsim.core.lora.serving.halves`)."""
AGGREGATIONS = ("dense", "pad", "lego")


def cut_layout(info: ModelInfo, pairs: Pairs, kept: Kept, rank: int) -> Layout:
    """What travels of a pruned model: its adapter of that rank, and what else is trained."""
    shapes = dict(zip(info.layout.names, info.layout.shapes, strict=True))
    rows, columns = _sides(info, kept)
    for path, (a, b) in pairs.items():
        r = min(rank, shapes[a][0])
        shapes[a] = (r, len(columns[path]) if path in columns else shapes[a][1])
        shapes[b] = (len(rows[path]) if path in rows else shapes[b][0], r)
    return part_of(info.layout, {n: s for n, s in shapes.items() if n not in info.still})


def cut(
    state: Mapping[str, Tensor], info: ModelInfo, pairs: Pairs, kept: Kept, rank: int
) -> FlatRecord:
    """A model without what is pruned, and with that many ranks."""
    rows, columns = _sides(info, kept)
    found = {n: t for n, t in state.items() if n not in info.still}
    for path, (a, b) in pairs.items():
        found[a] = found[a][:rank]
        found[b] = found[b][:, :rank]
        found[a] = found[a][:, columns[path]] if path in columns else found[a]
        found[b] = found[b][rows[path]] if path in rows else found[b]
    layout = cut_layout(info, pairs, kept, rank)
    return FlatRecord(layout, layout.flatten(found), {n: found[n].clone() for n in layout.beside})


def restored(
    state: Mapping[str, Tensor], info: ModelInfo, pairs: Pairs, kept: Kept
) -> dict[str, Tensor]:
    """The inverse of `cut`, but for missing ranks: zeros where something is pruned.

    Raises:
        ValueError: sizes do not fit what is left.
    """
    shapes = dict(zip(info.layout.names, info.layout.shapes, strict=True))
    rows, columns = _sides(info, kept)
    found = dict(state)
    for path, (a, b) in pairs.items():
        small_a, small_b = found[a], found[b]
        if path in columns:
            whole = small_a.new_zeros(small_a.shape[0], shapes[a][1])
            whole[:, columns[path]] = small_a
            small_a = whole
        if path in rows:
            whole = small_b.new_zeros(shapes[b][0], small_b.shape[1])
            whole[rows[path]] = small_b
            small_b = whole
        found[a], found[b] = small_a, small_b
    return found


def _sides(info: ModelInfo, kept: Kept) -> Sides:
    assert info.structures is not None
    return info.structures.sides({**info.structures.whole(), **kept})


def aggregate(
    adapters: Sequence[Adapter], weights: Sequence[float], sides: Sequence[Sides], before: Adapter,
    rank: int, method: str = "dense", missing: str = "renormalise",
) -> dict[str, Factors]:  # fmt: skip
    """Merge adapters of differently pruned models.

    **Reconstructed**: FedSpine says that updates are brought into a common form and weighed, not
    how. Every coordinate is averaged over the clients that have it; one that nobody has keeps its
    value.

    Args:
        adapters: of full shape, with zeros where pruned; of any ranks, all of one scaling.
        weights: of the clients.
        sides: what each client has left.
        before: the adapter before this round.
        rank: of the result.
        method: ``"dense"``: the mean of the products, cut to `rank` by singular values (FlexLoRA
            where nothing is pruned); ``"pad"``: means of A and of B (FedIT where nothing is
            pruned and ranks are equal); ``"lego"``: LoRA-LEGO on the factors as they are.
        missing: what stands in for a coordinate that a client lacks, for dense and pad:
            ``"renormalise"``: nothing, the others' weights are scaled up; ``"keep_global"``: its
            value before (FedMP's residual).
    """
    require(method in AGGREGATIONS, "aggregation", method, " or ".join(AGGREGATIONS))
    total = sum(weights)
    shares = [w / total for w in weights]
    if method == "lego":
        merged = lego(adapters, Lego(rank=min(rank, _most(adapters))), list(weights))
        return {m: truncated(f.factors, rank) for m, f in merged.items()}
    plain = {m for m in before if not any(m in s for pair in sides for s in pair)}
    found: dict[str, Factors] = {}
    for module, old in before.items():
        mine = [a[module] for a in adapters]
        if method == "pad":
            same = module in plain and {f.rank for f in mine} == {rank}
            found[module] = (
                fedit([{module: f} for f in mine], list(weights))[module]
                if same
                else _padded(
                    mine, shares, [_masks(old, module, s) for s in sides], old, rank, missing
                )
            )
            continue
        scaling = old.scaling
        if module not in plain:
            masks = [_masks(old, module, s) for s in sides]
            mine = [_mean_product(mine, shares, masks, old, missing)]
        given = list(weights) if module in plain else None
        found[module] = flexlora([{module: f} for f in mine], given, rank, scaling)[module]
    return found


def _most(adapters: Sequence[Adapter]) -> int:
    """Ranks of all adapters together, in the module that has fewest."""
    return min(sum(a[m].rank for a in adapters) for m in adapters[0])


def _masks(like: Factors, module: str, sides: Sides) -> tuple[Tensor, Tensor]:
    """Which outputs and inputs of a layer a client has, as 0 and 1, float64."""
    found = []
    for side, size in zip(sides, (like.b.shape[0], like.a.shape[1]), strict=True):
        mask = torch.ones(size, dtype=torch.float64)
        if module in side:
            mask.zero_()[side[module]] = 1.0
        found.append(mask)
    return found[0], found[1]


def _padded(
    factors: Sequence[Factors], shares: Sequence[float], masks: Sequence[tuple[Tensor, Tensor]],
    old: Factors, rank: int, missing: str,
) -> Factors:  # fmt: skip
    """Each factor averaged by coordinate over those who hold it."""
    before = truncated(old, rank)
    out = []
    for pick, whole in ((1, before.a), (0, before.b)):
        total = torch.zeros_like(whole, dtype=torch.float64)
        held = torch.zeros_like(total)
        for f, share, mask in zip(factors, shares, masks, strict=True):
            padded = truncated(f, rank)
            own = (padded.a if pick else padded.b).double()
            ranks = (torch.arange(rank) < f.rank).double()
            there = torch.outer(ranks, mask[1]) if pick else torch.outer(mask[0], ranks)
            total += share * own * there
            held += share * there
        if missing == "keep_global":
            mean = total + (1.0 - held) * whole.double()
        else:
            mean = torch.where(held > 0, total / held.clamp_min(1e-300), whole.double())
        out.append(mean.to(whole.dtype))
    return Factors(out[0], out[1], old.scaling)


def _mean_product(
    factors: Sequence[Factors], shares: Sequence[float], masks: Sequence[tuple[Tensor, Tensor]],
    old: Factors, missing: str,
) -> Factors:  # fmt: skip
    """The mean of the products by coordinate, exactly, as factors of scaling 1.

    Where only outputs or only inputs of the layer are pruned the weight of a coordinate is that of
    its row or column, and the mean stays in factors; where both are, one dense matrix is formed.
    """
    held = torch.stack([s * torch.outer(*m) for s, m in zip(shares, masks, strict=True)]).sum(0)
    by_row, by_column = bool((held == held[:, :1]).all()), bool((held == held[:1]).all())
    if missing == "keep_global":
        scale, rest = torch.ones_like(held), 1.0 - held
    else:
        scale, rest = torch.where(held > 0, 1 / held.clamp_min(1e-300), 0.0), (held == 0).double()
    a = torch.cat([f.a.double() * (s * f.scaling) for f, s in zip(factors, shares, strict=True)])
    b = torch.cat([f.b.double() for f in factors], 1)
    old_a, old_b = old.a.double() * old.scaling, old.b.double()
    dtype = old.a.dtype
    if by_row:
        b, old_b = b * scale[:, :1], old_b * rest[:, :1]
    elif by_column:
        a, old_a = a * scale[:1], old_a * rest[:1]
    else:
        dense = scale * (b @ a) + rest * (old_b @ old_a)
        u, s, vt = torch.linalg.svd(dense, full_matrices=False)
        return Factors(vt.to(dtype), (u * s).to(dtype))
    if bool(rest.any()):
        a, b = torch.cat([a, old_a]), torch.cat([b, old_b], 1)
    return Factors(a.to(dtype), b.to(dtype))


def moved(after: Adapter, before: Adapter) -> float:
    """Frobenius norm of what an adapter's products gained, over all modules together."""
    total = 0.0
    for module, f in after.items():
        old = before[module]
        a = torch.cat([f.a * f.scaling, -old.a * old.scaling])
        total += float(Factors(a, torch.cat([f.b, old.b], 1)).norm()) ** 2
    return math.sqrt(total)


def revived(adapter: Adapter, first: Adapter) -> dict[str, Factors]:
    """Ranks that are zero in both factors would stay so: they begin anew, with A as at first."""
    found = {}
    for module, f in adapter.items():
        dead = ~(f.a.any(1) | f.b.any(0))
        found[module] = Factors(torch.where(dead[:, None], first[module].a, f.a), f.b, f.scaling)
    return found
