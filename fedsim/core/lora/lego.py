"""LoRA-LEGO: adapters are taken apart rank by rank, clustered, and put together again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.errors import ConfigError, require
from fedsim.core.lora.factors import Adapter, Factors, Pool, pools
from fedsim.core.lora.kmeans import kmeans

EPS = 1e-12


@dataclass(frozen=True)
class Lego:
    """How LoRA-LEGO merges. Defaults are those of the re-implementations where they agree.

    Zhao et al., *Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes
    Through Rank-Wise Clustering*, ICLR 2025 (arXiv 2409.16167). **Reconstructed**: the formulas
    are those of two third-party implementations, the abstract and the reviews; the paper's own
    norm, features and reference rank could not be read, so each is an option here.

    Per module, with the scaling s of each adapter folded in: rank j of adapter i is a minimal
    semantic unit ``u = [sqrt(s) a_ij ; sqrt(s) b_ij]``. All units of all adapters are clustered by
    k-means. A cluster c gives one rank, its centre ``mu_c = sum w u / sum w`` over its units, times

        gamma_c = (sum w |u| / sum w) / |mu_c|         (parameter reweighting, at least 1)

    and the merged update is ``sqrt(r_ref / k) * sum_c b_c a_c^T`` (output reweighting).

    It aims neither at the sum nor at the mean of the updates, and depends on how an adapter is
    factorised: flipping the sign of a unit, scaling a by c and b by 1/c, or rotating the ranks
    changes the result although it does not change the adapter. `sign_align` and `balance` remove
    the first two; they are not in the paper.

    Attributes:
        rank: k: a number, ``"max"`` (of the adapters' ranks), ``"sum"`` (exact concatenation), or
            ``"energy:T"``, the smallest k whose inertia is at most 1 - T of the total.
        parameter_reweight: multiply centres by gamma.
        output_reweight: multiply the update by ``sqrt(r_ref / k)``.
        mass: the mean-consistent variant (an extension): units weigh as their adapter, both
            factors are multiplied by the root of the cluster's share, no output reweighting.
            With k = sum of ranks it is the weighted mean of the updates, exactly.
        feature: cluster the units as they are (``"raw"``), or with each half scaled to norm 1
            (``"unit"``); centres are means of the raw units either way.
        unit_weight: ``"uniform"``: all units alike; ``"client"``: as the adapter's weight;
            ``"client_per_rank"``: that divided by its rank, so that a rank-64 adapter does not
            outvote a rank-4 one.
        norm: of the parameter reweighting, ``"inf"`` or ``"l2"`` of the whole unit.
        gamma_max: gamma is cut there; 0 means it is not.
        reference_rank: r_ref; 0 means the mean of the adapters' ranks.
        sign_align: cluster units up to sign.
        balance: first scale every unit so that both halves have the same norm.
        order: of the merged ranks: ``"strength"``, so that the first r are the r largest, or
            ``"member"``, by their first unit, so that a single adapter keeps its order.
        allow_pad: where there are fewer units than k, add zero ranks instead of refusing.
        n_init: restarts of k-means.
        max_iter: iterations of each.
        seed: of k-means.

    Raises:
        ConfigError: a value is not allowed.
    """

    rank: int | str = "max"
    parameter_reweight: bool = True
    output_reweight: bool = True
    mass: bool = False
    feature: str = "raw"
    unit_weight: str = "uniform"
    norm: str = "inf"
    gamma_max: float = 0.0
    reference_rank: float = 0.0
    sign_align: bool = False
    balance: bool = False
    order: str = "strength"
    allow_pad: bool = False
    n_init: int = 10
    max_iter: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        self.energy()
        if isinstance(self.rank, int):
            require(self.rank >= 1, "rank", self.rank, "1 or above, max, sum or energy:T")
        for name, allowed in {
            "feature": ("raw", "unit"),
            "unit_weight": ("uniform", "client", "client_per_rank"),
            "norm": ("inf", "l2"),
            "order": ("strength", "member"),
        }.items():
            require(getattr(self, name) in allowed, name, getattr(self, name), " or ".join(allowed))
        require(self.gamma_max == 0 or self.gamma_max >= 1, "gamma_max", self.gamma_max, "0 or 1+")
        require(self.reference_rank >= 0, "reference_rank", self.reference_rank, "0 or above")
        require(self.n_init >= 1, "n_init", self.n_init, "1 or above")
        require(self.max_iter >= 1, "max_iter", self.max_iter, "1 or above")

    def energy(self) -> float | None:
        """The share T of ``rank = "energy:T"``, else None."""
        if isinstance(self.rank, int) or self.rank in ("max", "sum"):
            return None
        kind, _, share = self.rank.partition(":")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        allowed = "a number from 1, max, sum, or energy:T with 0 <= T <= 1"
        require(kind == "energy" and 0 <= value <= 1, "rank", self.rank, allowed)
        return value

    def rank_for(self, ranks: Sequence[int], name: str = "") -> int | None:
        """The rank k for adapters of these ranks; None where the energy decides.

        Raises:
            ConfigError: there are fewer units than k.
        """
        if self.energy() is not None:
            return None
        fixed = {"max": max(ranks), "sum": sum(ranks)}
        k = fixed[self.rank] if isinstance(self.rank, str) else self.rank
        if k > sum(ranks) and not self.allow_pad:
            raise ConfigError(
                f"rank = {k} must be {sum(ranks)} or below for {name or 'this module'}, which has "
                "so many units in all adapters; allow_pad adds zero ranks"
            )
        return k


@dataclass(frozen=True, eq=False)
class Merged:
    """One merged module, and how it came about.

    Attributes:
        factors: the merged factors, with scaling 1; ranks in the `order` of the options.
        labels: cluster of each unit, adapter by adapter: a row of `factors.a`.
        sizes: units of each cluster.
        gamma: factor of the parameter reweighting of each cluster, before the cut at `gamma_max`;
            computed whether or not it is applied.
        inertia: weighted sum of squared distances, in the space of the features.
        adapters: numbers of the adapters that have the module.
        ranks: their ranks.
    """

    factors: Factors
    labels: tuple[int, ...]
    sizes: tuple[int, ...]
    gamma: tuple[float, ...]
    inertia: float
    adapters: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def by_rank_index(self) -> bool:
        """Whether each cluster holds the same rank of every adapter: LEGO has degenerated.

        So it does where adapters start from the same point and stay near it; the merged factors
        are then the plain means of A and of B (FedIT), blown up by the parameter reweighting.
        """
        rank = self.ranks[0]
        alike = len(self.ranks) > 1 and set(self.ranks) == {rank} and len(self.sizes) == rank
        first = self.labels[:rank]
        return alike and len(set(first)) == rank and self.labels == first * len(self.ranks)


def lego(
    adapters: Sequence[Adapter], options: Lego | None = None, weights: Sequence[float] | None = None
) -> dict[str, Merged]:
    """Merge adapters module by module; see `Lego`.

    Modules with pools of the same size are clustered together. A module that some adapters lack
    is merged over those that have it. Arithmetic is in float32 (float64 where adapters are), of
    inner products in float64; the result is cast back once.

    Args:
        adapters: of any ranks and scalings.
        options: None means `Lego()`.
        weights: of the adapters, used where `unit_weight` or `mass` asks for them.

    Raises:
        ConfigError: a rank that is too large, or adapters that do not fit together.
    """
    options = options or Lego()
    grams: dict[tuple[int, int | None], dict[str, tuple[Tensor, Tensor]]] = {}
    for pool in pools(adapters, weights):
        ranks = [f.rank for f in pool.factors]
        k = options.rank_for(ranks, pool.name)
        units = _units(pool, options)
        gram = _gram(units, pool.factors[0].a.shape[1], options)
        weight = _unit_weights(pool, options)
        grams.setdefault((len(units), k), {})[pool.name] = (gram, weight)
    found: dict[str, tuple[Tensor, Tensor, float, int]] = {}
    for (points, k), group in grams.items():
        for names in _chunks(list(group), points):
            gram = torch.stack([group[n][0] for n in names])
            weight = torch.stack([group[n][1] for n in names])
            found |= dict(zip(names, _cluster(gram, weight, k, options), strict=True))
    return {
        pool.name: _assemble(pool, *found[pool.name], options) for pool in pools(adapters, weights)
    }


def _chunks(names: list[str], points: int, budget: int = 2**24) -> Iterable[list[str]]:
    """Names in groups whose Gram matrices have at most `budget` entries together."""
    size = max(1, budget // points**2)
    return (names[i : i + size] for i in range(0, len(names), size))


def _units(pool: Pool, options: Lego) -> Tensor:
    """All units of one module, [M, in + out]."""
    rows = []
    for factors in pool.factors:
        f = factors.folded()
        a, b = f.a, f.b.T
        if options.balance:
            one, two = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
            ratio = torch.where((one > 0) & (two > 0), (two / one.clamp_min(EPS)).sqrt(), 1.0)
            a, b = a * ratio, b / ratio.clamp_min(EPS)
        rows.append(torch.cat([a, b], 1))
    return torch.cat(rows)


def _gram(units: Tensor, split: int, options: Lego) -> Tensor:
    x = units.double()
    if options.feature == "unit":
        halves = (x[:, :split], x[:, split:])
        x = torch.cat([h / h.norm(dim=1, keepdim=True).clamp_min(EPS) for h in halves], 1)
    return x @ x.T


def _unit_weights(pool: Pool, options: Lego) -> Tensor:
    """Weight of each unit, float64 [M]; only their ratios matter, except with `mass`."""
    kind = "client" if options.mass else options.unit_weight
    values: list[float] = []
    for factors, share in zip(pool.factors, pool.weights, strict=True):
        one = {"uniform": 1.0, "client": share, "client_per_rank": share / factors.rank}[kind]
        # An adapter of weight zero still has units that lie somewhere.
        values += [max(one, EPS)] * factors.rank
    return torch.tensor(values, dtype=torch.float64)


def _cluster(
    gram: Tensor, weight: Tensor, k: int | None, options: Lego
) -> list[tuple[Tensor, Tensor, float, int]]:
    """Labels, signs, inertia and k of each pool.

    Units are first put in an order of their own, so that neither the order of the adapters nor
    that of the ranks decides where k-means starts.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1)
    # Identical units in identical order whatever their place: compare what rounding leaves alone.
    keys = torch.stack([_rounded(norms), _rounded(gram.abs().sum(-1)), weight])
    order = torch.arange(gram.shape[-1]).expand_as(norms)
    for key in keys.flip(0):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    back = order.argsort(dim=1)
    rows = order.unsqueeze(-1).expand_as(gram)
    sorted_gram = gram.gather(1, rows).gather(2, order.unsqueeze(1).expand_as(gram))
    sorted_weight = weight.gather(1, order)

    def run(pools: Tensor, count: int) -> list[tuple[Tensor, Tensor, float, int]]:
        found = kmeans(
            sorted_gram[pools], sorted_weight[pools], min(count, gram.shape[-1]),
            n_init=options.n_init, max_iter=options.max_iter, seed=options.seed,
            signed=options.sign_align,
        )  # fmt: skip
        labels, signs = (t.gather(1, back[pools]) for t in (found.labels, found.signs))
        inertia = found.inertia.tolist()
        return [(labels[i], signs[i], inertia[i], count) for i in range(len(pools))]

    every = torch.arange(len(gram))
    if k is not None:
        return run(every, k)
    share = options.energy()
    assert share is not None
    return [_enough(run, every[i : i + 1], gram.shape[-1], share) for i in every.tolist()]


def _enough(run, pool: Tensor, most: int, share: float):  # type: ignore[no-untyped-def]
    """The first clustering, by growing k, that leaves at most 1 - `share` of the inertia of 1."""
    found = run(pool, 1)[0]
    limit = (1 - share) * found[2]
    for k in range(2, most + 1):
        if found[2] <= limit + EPS:
            break
        found = run(pool, k)[0]
    return found


def _rounded(x: Tensor) -> Tensor:
    """About 40 bits of a float64, so that sums in another order compare equal."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**40).round(), exponent)


def _assemble(
    pool: Pool, labels: Tensor, signs: Tensor, inertia: float, k: int, options: Lego
) -> Merged:
    """Centres, reweighted, as factors."""
    units, split = _units(pool, options), pool.factors[0].a.shape[1]
    weight = _unit_weights(pool, options).to(units.dtype)
    kind = math.inf if options.norm == "inf" else 2.0
    member = torch.zeros(k, len(units), dtype=units.dtype)
    member[labels, torch.arange(len(units))] = weight
    mass = member.sum(1)
    share = member / mass.clamp_min(EPS**2).unsqueeze(1)
    centres = (share * signs.to(units.dtype)) @ units
    norms = torch.linalg.vector_norm(units, kind, dim=1)
    wanted, has = share @ norms, torch.linalg.vector_norm(centres, kind, dim=1)
    # A cluster of zeros has no norm to restore.
    gamma = torch.where(wanted > 0, wanted / has.clamp_min(EPS), torch.ones_like(has))
    if options.parameter_reweight:
        cut = gamma.clamp_max(options.gamma_max) if options.gamma_max else gamma
        centres = centres * cut.unsqueeze(1)
    if options.mass:
        centres = centres * mass.sqrt().unsqueeze(1)
    a, b = centres[:, :split], centres[:, split:]
    first = [int(h[0]) if len(h := (labels == c).nonzero().flatten()) else len(units) + c
             for c in range(k)]  # fmt: skip
    strength = (a.norm(dim=1) * b.norm(dim=1)).tolist()
    by_strength = options.order == "strength"
    order = sorted(range(k), key=lambda c: (-strength[c] * by_strength, first[c]))
    place = {c: i for i, c in enumerate(order)}
    ranks = tuple(f.rank for f in pool.factors)
    if options.output_reweight and not options.mass:
        b = b * math.sqrt((options.reference_rank or sum(ranks) / len(ranks)) / k)
    named = tuple(place[c] for c in labels.tolist())
    return Merged(
        Factors(a[order], b[order].T.contiguous()).to(pool.dtype),
        named,
        tuple(named.count(i) for i in range(k)),
        tuple(gamma[order].tolist()),
        inertia,
        pool.members,
        ranks,
    )
