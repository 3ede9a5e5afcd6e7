"""Low-rank updates of linear layers, and what every merger needs of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from fedsim.core.errors import ConfigError, require


@dataclass(frozen=True, eq=False)
class Factors:
    """The update of one linear layer, ``scaling * b @ a``.

    Attributes:
        a: shape [rank, in] (peft's ``lora_A.weight``).
        b: shape [out, rank] (peft's ``lora_B.weight``).
        scaling: number before the product.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Number of rows of `a`."""
        return self.a.shape[0]

    def delta(self) -> Tensor:
        """The update itself, shape [out, in]; for tests and small layers."""
        return self.scaling * (self.b @ self.a)

    def folded(self) -> Factors:
        """The same update with scaling 1: the root of the scaling goes into each factor."""
        root = math.sqrt(abs(self.scaling))
        return Factors(self.a * root, self.b * math.copysign(root, self.scaling))

    def norm(self) -> Tensor:
        """Frobenius norm of the update, ``sqrt(sum((a a^T) * (b^T b)))``: nothing is dense."""
        inner = ((self.a @ self.a.T) * (self.b.T @ self.b)).sum()
        return abs(self.scaling) * inner.clamp_min(0).sqrt()

    def to(self, dtype: torch.dtype) -> Factors:
        """Both factors in another precision."""
        return Factors(self.a.to(dtype), self.b.to(dtype), self.scaling)


Adapter = Mapping[str, Factors]
"""A LoRA adapter: the factors of each adapted module, by the module's path."""


def scaling_of(alpha: float, rank: int, rslora: bool = False) -> float:
    """The number before ``B @ A``: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@dataclass(frozen=True, eq=False)
class Pool:
    """One module of several adapters.

    Attributes:
        name: path of the module.
        factors: of each adapter that has it, in working precision.
        weights: of these adapters, summing to 1.
        members: their numbers in the list of adapters.
        dtype: what the merged factors are cast to, once.
    """

    name: str
    factors: tuple[Factors, ...]
    weights: tuple[float, ...]
    members: tuple[int, ...]
    dtype: torch.dtype

    def same_rank(self, method: str) -> int:
        """The rank all have.

        Raises:
            ConfigError: ranks or scalings differ.
        """
        ranks = sorted({f.rank for f in self.factors})
        require(len(ranks) == 1, f"{method}: ranks of {self.name}", ranks, "equal")
        self.same_scaling(method)
        return ranks[0]

    def same_scaling(self, method: str) -> float:
        """The scaling all have.

        Raises:
            ConfigError: scalings differ.
        """
        scalings = sorted({f.scaling for f in self.factors})
        require(len(scalings) == 1, f"{method}: scalings of {self.name}", scalings, "equal")
        return scalings[0]


def pools(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Iterator[Pool]:
    """Every module that some adapter has, one at a time, in order of first appearance.

    Half precision is raised to float32. Weights are normalised over the adapters that have the
    module.

    Args:
        adapters: at least one.
        weights: of the adapters, at least one of them positive; None weighs all alike.

    Raises:
        ConfigError: no adapter, wrong weights, or shapes that do not fit together.
    """
    if not adapters:
        raise ConfigError("adapters = [] must be one adapter or more")
    given = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    sound = len(given) == len(adapters) and all(math.isfinite(w) and w >= 0 for w in given)
    require(
        sound and sum(given) > 0, "weights", given, f"{len(adapters)} numbers from 0, not all 0"
    )
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        members = tuple(i for i, adapter in enumerate(adapters) if name in adapter)
        found = [adapters[i][name] for i in members]
        _check(name, found)
        total = sum(given[i] for i in members)
        shares = [given[i] / total if total else 1 / len(members) for i in members]
        dtype = reduce(torch.promote_types, (t.dtype for f in found for t in (f.a, f.b)))
        work = torch.promote_types(dtype, torch.float32)
        yield Pool(name, tuple(f.to(work) for f in found), tuple(shares), members, dtype)


def _check(name: str, found: Sequence[Factors]) -> None:
    for f in found:
        flat = f.a.dim() == f.b.dim() == 2
        if not flat or f.a.shape[0] != f.b.shape[1] or not f.rank:
            raise ConfigError(
                f"{name}: A of shape {tuple(f.a.shape)} and B of shape {tuple(f.b.shape)} are no "
                "factors; [rank, in] and [out, rank] are needed"
            )
    shapes = {(f.b.shape[0], f.a.shape[1]) for f in found}
    require(len(shapes) == 1, f"{name}: shapes [out, in]", sorted(shapes), "equal")


def concatenated(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """``sum_i weights_i * scaling_i * b_i @ a_i`` exactly, of rank ``sum_i rank_i``.

    The weight goes on one factor only; on both it would count twice.
    """
    a = torch.cat([f.a * (w * f.scaling) for f, w in zip(factors, weights, strict=True)])
    return Factors(a, torch.cat([f.b for f in factors], 1))


def compact_svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of an update, from its factors.

    With ``b = Q_b R_b`` and ``a^T = Q_a R_a`` it is that of ``R_b R_a^T``, of the size of the
    rank, and done in float64; an [out, in] matrix is never formed. Signs are fixed: the largest
    entry of each right vector is positive.

    Returns:
        U [out, q], singular values [q], V^T [q, in] with q = min(rank, out, in).
    """
    dtype = factors.a.dtype
    q_b, r_b = torch.linalg.qr(factors.b.double() * factors.scaling)
    q_a, r_a = torch.linalg.qr(factors.a.T.double())
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    u, vt = q_b @ u, vt @ q_a.T
    sign = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()
    return (u * sign.T).to(dtype), s.to(dtype), (vt * sign).to(dtype)


def truncated(factors: Factors, rank: int) -> Factors:
    """The first `rank` rows of `a` and columns of `b`; zeros where there are fewer."""
    a, b = factors.a[:rank], factors.b[:, :rank]
    if lacking := rank - a.shape[0]:
        a = torch.cat([a, a.new_zeros(lacking, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], lacking)], 1)
    return Factors(a, b, factors.scaling)


def compacted(factors: Factors, rank: int | None = None) -> Factors:
    """The same update, of no more ranks than its matrix can have; scaling 1.

    Args:
        factors: the update.
        rank: cut it to so many, the best approximation; None: exact.
    """
    most = min(factors.a.shape[1], factors.b.shape[0])
    wanted = most if rank is None else min(rank, most)
    if factors.rank <= wanted:
        return Factors(factors.a * factors.scaling, factors.b)
    u, s, vt = compact_svd(factors)
    return truncated(Factors(vt, u * s), wanted)
