"""Knowledge on a public set: what it says of a client, how near two clients are, how it is fused.

Knowledge of a client is an array [M, C]: what its model says of M public examples, as
probabilities or logits. All sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsim.core.errors import require

KNOWLEDGE, DIGEST, VOTES = "knowledge", "public", "votes"
"""Entries of a reply: what the model says, on which public set, and where it may vote."""
SUBSET, ROWS = "subset", "rows"
"""Record and entry that name some of the public examples, by place."""
FLOOR = 1e-8
"""Smallest probability in an estimated distribution."""


def normalised(p: Tensor) -> Tensor:
    """Distributions on the last axis, clamped at `FLOOR` and made to sum to 1 again."""
    p = p.double().clamp_min(FLOOR)
    return p / p.sum(-1, keepdim=True)


def mean_softmax(knowledge: Tensor) -> Tensor:
    """Mean of the predicted distributions: [N, M, C] gives [N, C]."""
    return knowledge.double().mean(1)


def argmax_hist(knowledge: Tensor) -> Tensor:
    """Shares of the predicted classes: [N, M, C] gives [N, C]."""
    classes = knowledge.shape[-1]
    found = torch.nn.functional.one_hot(knowledge.argmax(-1), classes)
    return found.double().mean(1)


ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_softmax": mean_softmax,
    "argmax_hist": argmax_hist,
}
"""Estimates of the clients' label distributions, from probabilities."""


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def _js(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return (_kl(p, m) + _kl(q, m)) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": _kl,
    "sym_kl": lambda p, q: (_kl(p, q) + _kl(q, p)) / 2,
    "js": _js,
    "l2": lambda p, q: (p - q).square().sum(-1).sqrt(),
    "cosine": lambda p, q: 1 - torch.cosine_similarity(p, q, dim=-1),
}
"""Distance of the sender's distribution q from the receiver's p, over the last axis."""


def distances(estimates: Tensor, kind: str = "kl") -> Tensor:
    """``delta[n, m]`` between distributions [N, C]: n receives, m sends; 0 on the diagonal."""
    p = normalised(estimates)
    delta = DISTANCES[kind](p[:, None, :], p[None, :, :]).clamp_min(0.0)
    delta.fill_diagonal_(0.0)
    return delta


WEIGHTINGS = ("softmax", "inverse", "topk", "threshold")
"""How distances become weights: ``exp(-beta delta)``; ``1 / (1 + beta delta)``; alike for the
`neighbours` nearest; alike for those within `radius`."""


def effectiveness(
    delta: Tensor,
    beta: float = 10.0,
    weighting: str = "softmax",
    include_self: bool = True,
    neighbours: int = 3,
    radius: float = 0.1,
) -> Tensor:
    """Weights ``w[n, m]`` of m's knowledge for n, from their distances; rows sum to 1.

    Args:
        delta: distances, shape [N, N], 0 on the diagonal.
        beta: sharpness.
        weighting: one of `WEIGHTINGS`.
        include_self: whether a client's own knowledge counts; alone it always does.
        neighbours: of ``"topk"``, others than itself.
        radius: of ``"threshold"``.
    """
    count = len(delta)
    own = torch.eye(count, dtype=torch.bool)
    if weighting == "softmax":
        score = -beta * delta
    elif weighting == "inverse":
        score = -(1 + beta * delta).log()
    elif weighting == "topk":
        # Places of equal distance are ranked by number, so that the choice is always the same.
        rank = delta.masked_fill(own, torch.inf).argsort(dim=-1, stable=True).argsort()
        score = torch.where((rank < neighbours) | own, 0.0, -torch.inf).double()
    else:
        score = torch.where((delta <= radius) | own, 0.0, -torch.inf).double()
    if not include_self and count > 1:
        rest = score.masked_fill(own, -torch.inf)
        alone = torch.isinf(rest).all(-1, keepdim=True)
        score = torch.where(alone, score, rest)
    return score.softmax(-1)


def fuse(weights: Tensor, knowledge: Tensor) -> Tensor:
    """``sum_m w[n, m] F_m``: one product of matrices, in float64; rounded once.

    Args:
        weights: shape [K, N].
        knowledge: shape [N, M, C].

    Returns:
        shape [K, M, C], in the dtype of `knowledge`.
    """
    flat = weights @ knowledge.double().flatten(1)
    return flat.view(len(weights), *knowledge.shape[1:]).to(knowledge.dtype)


def check_options(epd: str, distance: str, weighting: str) -> None:
    """Raise `ConfigError` where an option is unknown."""
    options: Sequence[tuple[str, str, Sequence[str]]] = (
        ("epd", epd, (*ESTIMATES, "label_hist")),
        ("distance", distance, tuple(DISTANCES)),
        ("weighting", weighting, WEIGHTINGS),
    )
    for name, value, allowed in options:
        require(value in allowed, name, repr(value), f"one of {', '.join(allowed)}")


# ---------------------------------------------------------------- density ratios (selective FD)


def kulsif(
    known: Tensor, auxiliary: Tensor, width: float, ridge: float
) -> Callable[[Tensor], Tensor]:
    """Estimates the ratio p / q of the densities of two samples (KuLSIF, Kanamori et al. 2012).

    ``r(x) = sum_j alpha_j k(x, aux_j) + mean_i k(x, known_i) / ridge`` with
    ``(K11 / n + ridge I) alpha = -K12 1 / (n m ridge)`` and Gaussian kernels.

    Args:
        known: sample of p, shape [m, d].
        auxiliary: sample of q, shape [n, d], whose support covers that of p.
        width: of the kernel.
        ridge: regularisation.

    Returns:
        a function of points [k, d] that gives the ratios, float64 [k].
    """
    known, auxiliary = known.double(), auxiliary.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a, b).square() / (2 * width**2)).exp()

    n, m = len(auxiliary), len(known)
    left = kernel(auxiliary, auxiliary) / n + ridge * torch.eye(n, dtype=torch.float64)
    right = -kernel(auxiliary, known).sum(1) / (n * m * ridge)
    alpha = torch.linalg.solve(left, right)

    def ratio(x: Tensor) -> Tensor:
        x = x.double()
        return kernel(x, auxiliary) @ alpha + kernel(x, known).mean(1) / ridge

    return ratio
