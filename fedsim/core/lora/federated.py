"""How federated LoRA methods aggregate, each as its paper defines it.

Every function takes the clients' adapters and their weights (numbers of examples, for example;
None weighs all alike) and gives factors by module. ``p_i`` are the normalised weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedsim.core.errors import ConfigError, require
from fedsim.core.lora.factors import (
    Adapter,
    Factors,
    Pool,
    compact_svd,
    concatenated,
    pools,
    truncated,
)

Weights = Sequence[float] | None
Letter = Literal["a", "b"]


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)


def _same(tensors: Sequence[Tensor], what: str) -> Tensor:
    if any(not torch.equal(t, tensors[0]) for t in tensors[1:]):
        raise ConfigError(f"{what} is frozen but differs between adapters; it must be shared")
    return tensors[0]


def _means(pool: Pool, method: str) -> Factors:
    scaling = pool.same_scaling(method)
    pool.same_rank(method)
    return Factors(
        _mean([f.a for f in pool.factors], pool.weights),
        _mean([f.b for f in pool.factors], pool.weights),
        scaling,
    )


def fedit(adapters: Sequence[Adapter], weights: Weights = None) -> dict[str, Factors]:
    """FedIT: the means of A and of B, each for itself.

    Zhang et al., *Towards Building the Federated GPT: Federated Instruction Tuning*, ICASSP 2024
    (arXiv 2305.05644): ``A = sum p_i A_i``, ``B = sum p_i B_i``. The product is not the mean of
    the products: it has the cross terms ``p_i p_j B_i A_j``. Ranks and scalings must be equal.
    With equal weights it is also the "weight average" of the merging literature.
    """
    return {p.name: _means(p, "fedit").to(p.dtype) for p in pools(adapters, weights)}


def flora(adapters: Sequence[Adapter], weights: Weights = None) -> dict[str, Factors]:
    """FLoRA: stacking, so that the product is the weighted mean of the products, exactly.

    Wang et al., *FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations*, NeurIPS 2024: ``A = [p_1 A_1; ...; p_N A_N]``, ``B = [B_1 ... B_N]``; the weight
    is on one factor only, since on both it would count as ``p_i^2``. Ranks add up. The scaling of
    each adapter is folded into A, so adapters of different alpha are exact too. The released
    code's stacked width and zero-padding scalings are right only in special cases; not followed.
    """
    return {
        p.name: concatenated(p.factors, p.weights).to(p.dtype) for p in pools(adapters, weights)
    }


def flexlora(
    adapters: Sequence[Adapter],
    weights: Weights = None,
    rank: int | None = None,
    scaling: float = 1.0,
) -> dict[str, Factors]:
    """FlexLoRA: the best approximation of the mean product, for every rank.

    Bai et al., *Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
    Client Resources*, NeurIPS 2024: with the singular values of
    ``sum p_i s_i B_i A_i = U S V^T``, a client of rank r gets ``A = V_r^T`` and
    ``B = U_r S_r / scaling``. The first r ranks of the result are what that client gets
    (`truncated`). The decomposition is done in factors and [out, in] is never formed.

    Args:
        adapters: of any ranks and scalings.
        weights: of the adapters.
        rank: of the result; None: all of them, which is exact. Zero ranks fill up.
        scaling: which the result is to have, alpha / r of the client.
    """
    found = {}
    for p in pools(adapters, weights):
        u, s, vt = compact_svd(concatenated(p.factors, p.weights))
        whole = Factors(vt, u * s / scaling, scaling)
        found[p.name] = (whole if rank is None else truncated(whole, rank)).to(p.dtype)
    return found


def hetlora(
    adapters: Sequence[Adapter], weights: Weights = None, rank: int | None = None
) -> dict[str, Factors]:
    """HetLoRA: zero-padded means, weighted by the norm of each update.

    Cho et al., *Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models*,
    EMNLP 2024, after a third-party description: with all ranks padded to the largest,
    ``A = sum w_i A_i`` and ``B = sum w_i B_i``, ``w_i = |B_i A_i|_F / sum_j |B_j A_j|_F`` in each
    module; a client of rank r takes the first r ranks (`truncated`). Where all updates are zero
    the weights are equal. `weights` multiply the norms; the paper has none. See `hetlora_penalty`
    and `hetlora_rank` for the client's side. Scalings must be equal.
    """
    found = {}
    for p in pools(adapters, weights if weights is not None else [1.0] * len(adapters)):
        scaling = p.same_scaling("hetlora")
        norms = [float(f.norm()) * w for f, w in zip(p.factors, p.weights, strict=True)]
        shares = [n / sum(norms) for n in norms] if sum(norms) > 0 else list(p.weights)
        width = rank or max(f.rank for f in p.factors)
        padded = [truncated(f, width) for f in p.factors]
        a, b = _mean([f.a for f in padded], shares), _mean([f.b for f in padded], shares)
        found[p.name] = Factors(a, b, scaling).to(p.dtype)
    return found


def hetlora_tail(rank: int, gamma: float) -> int:
    """Where the tail of HetLoRA's self-pruning starts: ``floor(gamma * rank)``, at least 1."""
    require(0 < gamma <= 1, "gamma", gamma, "above 0 and at most 1")
    return max(1, int(gamma * rank))


def hetlora_penalty(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    """HetLoRA's regulariser ``|B[:, g:]|_F * |A[g:]|_F`` with g = floor(gamma * rank).

    The client adds it, times lambda, to its loss, so that the last ranks die out.
    """
    start = hetlora_tail(a.shape[-2], gamma)
    tail_a, tail_b = a[..., start:, :], b[..., start:]
    return torch.linalg.matrix_norm(tail_a) * torch.linalg.matrix_norm(tail_b)


def hetlora_rank(before: Factors, after: Factors, gamma: float) -> int:
    """Self-pruning: the tail is cut off if its norm product shrank in local training."""
    start = hetlora_tail(before.rank, gamma)
    old, new = (float(hetlora_penalty(f.a, f.b, gamma)) for f in (before, after))
    return start if new < old else before.rank


def fedex(
    adapters: Sequence[Adapter], weights: Weights = None
) -> tuple[dict[str, Factors], dict[str, Factors]]:
    """FedEx-LoRA: FedIT, and what it misses, to be added to the frozen weight.

    Singhal et al., *FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
    Foundation Models*, ACL 2025: clients load the means A and B, and ``W += s * residual``,
    ``residual = sum p_i B_i A_i - B A = sum p_i (B_i - B) (A_i - A)``. It comes in factors of rank
    (N - 1) r: ``[p_i (B_i - B)]_{i<N}`` and ``[A_i - A_N]_{i<N}``. The paper's weights are
    uniform. The released code adds the residual transposed for `nn.Linear`; here it has the
    shape of the weight, [out, in].

    Returns:
        The means; the residuals (rank at least 1: zeros for one client).
    """
    means, residuals = {}, {}
    for p in pools(adapters, weights):
        mean = _means(p, "fedex_lora")
        *rest, last = zip(p.factors, p.weights, strict=True)
        a = [f.a - last[0].a for f, _ in rest] or [torch.zeros_like(mean.a[:1])]
        b = [w * (f.b - mean.b) for f, w in rest] or [torch.zeros_like(mean.b[:, :1])]
        means[p.name] = mean.to(p.dtype)
        residuals[p.name] = Factors(torch.cat(a), torch.cat(b, 1), mean.scaling).to(p.dtype)
    return means, residuals


def _one_factor(
    adapters: Sequence[Adapter], weights: Weights, frozen: Letter, method: str
) -> dict[str, Factors]:
    found = {}
    for p in pools(adapters, weights):
        scaling = p.same_scaling(method)
        p.same_rank(method)
        rows, columns = [f.a for f in p.factors], [f.b for f in p.factors]
        if frozen == "a":
            a, b = _same(rows, f"{method}: A of {p.name}"), _mean(columns, p.weights)
        else:
            a, b = _mean(rows, p.weights), _same(columns, f"{method}: B of {p.name}")
        found[p.name] = Factors(a, b, scaling).to(p.dtype)
    return found


def ffa(adapters: Sequence[Adapter], weights: Weights = None) -> dict[str, Factors]:
    """FFA-LoRA: A stays at its shared start, so the mean of B gives the mean product exactly.

    Sun et al., *Improving LoRA in Privacy-preserving Federated Learning*, ICLR 2024:
    ``sum p_i B_i A_0 = (sum p_i B_i) A_0``.

    Raises:
        ConfigError: the adapters' A differ.
    """
    return _one_factor(adapters, weights, "a", "ffa_lora")


def trained_factor(server_round: int) -> Letter:
    """Which factor RoLoRA trains in a round, counted from 1: B first, then A, and so on."""
    return "b" if server_round % 2 else "a"


def rolora(
    adapters: Sequence[Adapter], weights: Weights = None, server_round: int = 1
) -> dict[str, Factors]:
    """RoLoRA: one factor is frozen in each round, in turn, and the other averaged exactly.

    Chen et al., *Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA* (arXiv
    2502.01755), after an audit of the supplement: A is frozen first (`trained_factor`). The
    supplement's step counter of each trainer is not followed; rounds decide.

    Raises:
        ConfigError: the frozen factors differ.
    """
    frozen: Letter = "a" if trained_factor(server_round) == "b" else "b"
    return _one_factor(adapters, weights, frozen, "rolora")


def fedsa(adapters: Sequence[Adapter], weights: Weights = None) -> list[dict[str, Factors]]:
    """FedSA-LoRA: only A is averaged; every client keeps its own B.

    Guo et al., *Selective Aggregation for Low-Rank Adaptation in Federated Learning*, ICLR 2025
    (arXiv 2410.01463): A learns what is common, B what is the client's own.

    Returns:
        The adapter of each client.
    """
    own: list[dict[str, Factors]] = [{} for _ in adapters]
    for p in pools(adapters, weights):
        scaling = p.same_scaling("fedsa_lora")
        p.same_rank("fedsa_lora")
        a = _mean([f.a for f in p.factors], p.weights)
        for i, f in zip(p.members, p.factors, strict=True):
            own[i][p.name] = Factors(a, f.b, scaling).to(p.dtype)
    return own
