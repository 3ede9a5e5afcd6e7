"""Client half of PACFL."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsim.core.errors import ConfigError
from fedsim.core.program import Batch, LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class PACFL(LocalProgram):
    """Local SGD; when asked for, no training but a basis of the client's examples, by label.

    For each label the first `n_basis` left singular vectors of the matrix of its examples
    (features x examples). They travel one behind the other in a vector as long as the model, so
    with few parameters there is room for fewer.

    Attributes:
        n_basis: singular vectors of each label.
        basis: whether the basis is asked for; then all examples come as one batch.

    Raises:
        ConfigError: examples have no single labels: regression, or next tokens.
    """

    vectorized = False

    n_basis: int = 5
    basis: bool = False

    def step(self, s: LocalState, batch: Batch) -> None:
        """Train, or find the basis."""
        if not self.basis:
            super().step(s, batch)
            return
        x, y = batch.fields["x"].flatten(1), batch.fields["y"]
        if y.dim() > 1 or y.is_floating_point():
            raise ConfigError("PACFL needs one label for each example; these targets are no labels")
        s.gradient(batch, at=s.w.clone(), training=False)  # for the loss that every reply has
        labels, features = y.unique(), x.shape[1]
        room = s.w.shape[-1] // features
        each = max(1, min(self.n_basis, room // len(labels)))
        found = [torch.linalg.svd(x[y == c].T, full_matrices=False)[0][:, :each] for c in labels]
        vectors = torch.cat(found, 1).T[:room]
        strongest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        packed = torch.zeros_like(s.w)  # signs are arbitrary: make the largest entry positive
        packed[: vectors.numel()] = (vectors * strongest.sign()).flatten()
        s.sent["basis"] = packed
        s.metrics["features"] = features
