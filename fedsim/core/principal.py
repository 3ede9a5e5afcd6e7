"""Principal-gradient aggregation: client updates combined along their shared directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Numbers that are turned to float64 at a time."""

Renorm = Literal["none", "mean", "mean_norm"]


def principal_aggregate(
    G: Tensor,
    rho: float = 0.8,
    r_max: int | None = None,
    renorm: Renorm = "none",
    rtol: float | None = None,
) -> Tensor:
    """Combine the clients' updates of one tensor along their principal directions.

    With ``H = G G^T / N = E diag(lam) E^T``, unit directions ``u_j = G^T e_j / sqrt(N lam_j)`` and
    relative energies ``ltil_j = lam_j / sum(lam)``, FedLD's code (`pcgrad_svd`) projects every
    update on the first ``k = int(rho N)`` directions, rescales each projection to the update's own
    norm times the energy, and takes the plain mean. In closed form, which is what is computed::

        g_bar = sum_{j<=k} ltil_j a_j u_j = G^T c,     a_j = mean_m ||g_m|| sign <g_m, u_j>

    so the Gram matrix gives everything; it is summed in float64 whatever the dtype of `G`. The
    code's majority vote on the sign of u_j cancels and is left out.

    The result lies in the span of the updates, is never longer than they are on average, scales
    and rotates with them, and is their mean where they are collinear (one client alone, or a
    tensor of one number). It need *not* have a positive inner product with the mean or with any
    update, is shorter than the mean the more the updates differ, jumps where <g_m, u_j> crosses
    zero, and is not unique where eigenvalues tie.

    What FedLD's code turns into NaN is finite here: directions without energy are left out, an
    update orthogonal to a direction counts 0 there, and zero updates give zero. Its k = 0 for one
    client, which then never moves, is 1 here.

    Args:
        G: updates, shape [N, d], finite.
        rho: share of the N directions that is kept, in (0, 1].
        r_max: keep at most that many; None: no limit.
        renorm: length of the result: ``"none"`` as it comes, ``"mean"`` that of the mean update,
            ``"mean_norm"`` the mean of the updates' lengths. (Not in FedLD's code.)
        rtol: an eigenvalue is zero below ``N rtol`` times the largest, a cosine below ``N rtol``;
            None: the machine precision of `G` (of float32 for shorter dtypes).

    Returns:
        The aggregate, shape [d], in the dtype of `G`.
    """
    rows = G.unbind()
    return combine(rows, coefficients(gram(rows), rho, r_max, renorm, rtol or precision(G.dtype)))


def precision(dtype: torch.dtype) -> float:
    """Machine precision of the dtype, at most that of float32."""
    return min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _blocks(rows: Sequence[Tensor]) -> Iterator[Tensor]:
    """The matrix of these rows, some columns at a time, in float64."""
    width = max(1, BLOCK // len(rows))
    for first in range(0, max(1, len(rows[0])), width):
        yield torch.stack([row[first : first + width] for row in rows]).double()


def gram(rows: Sequence[Tensor]) -> Tensor:
    """Inner products of N rows, shape [N, N], in float64."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows[0].device)
    for block in _blocks(rows):
        total += block @ block.T
    return total


def combine(rows: Sequence[Tensor], c: Tensor) -> Tensor:
    """``sum_m c_m rows[m]``, shape [d], in the rows' dtype."""
    return torch.cat([c @ block for block in _blocks(rows)]).to(rows[0].dtype)


def coefficients(K: Tensor, rho: float, r_max: int | None, renorm: Renorm, rtol: float) -> Tensor:
    """The c of `principal_aggregate`, shape [N], from the Gram matrix of shape [N, N]."""
    N = len(K)
    lam, E = torch.linalg.eigh(K / N)
    lam, E = lam.flip(0).clamp_min(0), E.flip(1)
    if not lam[0] > 0:
        return torch.zeros_like(lam)
    k = min(max(1, int(rho * N)), r_max or N, int((lam > N * rtol * lam[0]).sum()))
    length, norms = (N * lam[:k]).sqrt(), K.diagonal().clamp_min(0).sqrt()
    along = E[:, :k] * length  # <g_m, u_j>
    sign = along.sign() * (along.abs() > N * rtol * norms[:, None])
    a = (norms[:, None] * sign).mean(0)
    c = E[:, :k] @ (lam[:k] / lam.sum() * a / length)
    if renorm != "none":
        size = (c @ K @ c).clamp_min(0).sqrt()
        wanted = norms.mean() if renorm == "mean_norm" else K.mean().clamp_min(0).sqrt()
        c = c * (wanted / size if size > 0 else 1.0)
    return c
