"""One base model in memory, and adapters that take turns in it or answer together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.errors import DataError
from fedsim.core.lora import Factors
from fedsim.core.text import shown
from fedsim.models.adapters import PeftAdapter
from fedsim.models.exporting import base_digest
from fedsim.models.lora import is_linear, sizes

TOGETHER = 2048
"""Positions (examples times length) below which one forward pass for all adapters is faster."""


class Slot(nn.Module):
    """A linear layer of the base, and the update it has at the moment.

    Args:
        base: the layer.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.factors: Factors | None = None
        self.stack: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; with a stack of n updates the first axis is n groups."""
        out: Tensor = self.base(x)
        if self.factors is not None:
            f = self.factors
            return out + (f.scaling * F.linear(F.linear(x.to(f.a.dtype), f.a), f.b)).to(out.dtype)
        if self.stack is not None:
            a, b = self.stack
            rows = x.reshape(len(a), -1, x.shape[-1]).to(a.dtype)
            update = torch.bmm(torch.bmm(rows, a.transpose(1, 2)), b.transpose(1, 2))
            out = out + update.view(out.shape).to(out.dtype)
        return out


class Host:
    """A base model that wears adapters; its weights are never changed.

    Args:
        base: taken over, in evaluation mode; its linear layers are wrapped when an adapter first
            needs them.
        prefix: of the adapters' module names within `base`.
    """

    def __init__(self, base: nn.Module, prefix: str = "") -> None:
        self.module, self._prefix = base.eval().requires_grad_(False), prefix
        self.digest = base_digest(base)
        self._slots: dict[str, Slot] = {}

    def check(self, adapter: PeftAdapter) -> None:
        """Whether an adapter belongs to this base.

        Raises:
            DataError: a module or tensor that the base lacks, another shape, or another base.
        """
        if adapter.base_hash is not None and adapter.base_hash != self.digest:
            raise DataError(
                f"{adapter.source} is refused: it belongs to base weights with the hash "
                f"{adapter.base_hash[:12]}, these have {self.digest[:12]}"
            )
        for name, f in adapter.factors.items():
            layer = self._layer(name, adapter.source)
            if (f.a.shape[1], f.b.shape[0]) != sizes(layer):
                raise DataError(
                    f"{adapter.source} is refused: {name} has {sizes(layer)} inputs and outputs, "
                    f"the update {(f.a.shape[1], f.b.shape[0])}"
                )
        own = dict(self.module.named_parameters())
        for name, tensor in adapter.saved.items():
            mine = own.get(self._prefix + name)
            if mine is None or mine.shape != tensor.shape:
                raise DataError(
                    f"{adapter.source} is refused: the base has no weight {shown(name)} of shape "
                    f"{tuple(tensor.shape)}"
                )

    def _layer(self, name: str, source: str) -> nn.Module:
        if name in self._slots:
            return self._slots[name].base
        try:
            layer = self.module.get_submodule(self._prefix + name)
        except AttributeError:
            layer = nn.Identity()
        if not is_linear(layer):
            raise DataError(f"{source} is refused: {shown(name)} is no linear layer of the base")
        return layer

    def _slot(self, name: str) -> Slot:
        if name not in self._slots:
            path = self._prefix + name
            parent, _, last = path.rpartition(".")
            slot = Slot(self.module.get_submodule(path))
            setattr(self.module.get_submodule(parent), last, slot)
            self._slots[name] = slot
        return self._slots[name]

    @contextmanager
    def wearing(self, adapter: PeftAdapter | None) -> Iterator[nn.Module]:
        """The base with an adapter for the time of the block.

        Raises:
            DataError: it does not belong here; nothing was changed.
        """
        if adapter is not None:
            self.check(adapter)
        names = dict(adapter.factors) if adapter is not None else {}
        saved = dict(adapter.saved) if adapter is not None else {}
        own = dict(self.module.named_parameters())
        kept = {n: own[self._prefix + n].data for n in saved}
        try:
            for name, f in names.items():
                self._slot(name).factors = f
            for name, tensor in saved.items():
                own[self._prefix + name].data = tensor.to(kept[name].dtype)
            yield self.module
        finally:
            for slot in self._slots.values():
                slot.factors = None
            for name, tensor in kept.items():
                own[self._prefix + name].data = tensor

    @torch.no_grad()
    def outputs(
        self, adapters: Sequence[PeftAdapter], x: Tensor, together: bool | None = None
    ) -> Tensor:
        """What every adapter makes of the same inputs.

        Args:
            adapters: for one base forward pass they must have no tensors of `modules_to_save`.
            x: inputs [B, ...].
            together: one base forward pass with n times the examples, and all updates in batched
                products; or one pass after another. None: whichever is faster for this size.

        Returns:
            Outputs [n, B, ...].
        """
        for adapter in adapters:
            self.check(adapter)
        alone = any(a.saved for a in adapters)
        if together is None:
            together = x.numel() * len(adapters) <= TOGETHER
        if alone or not together or not adapters:
            parts = []
            for adapter in adapters:
                with self.wearing(adapter) as module:
                    parts.append(module(x))
            return torch.stack(parts)
        try:
            for name in dict.fromkeys(n for a in adapters for n in a.factors):
                self._slot(name).stack = _stacked([a.factors.get(name) for a in adapters])
            wide: Tensor = self.module(x.repeat(len(adapters), *[1] * (x.dim() - 1)))
        finally:
            for slot in self._slots.values():
                slot.stack = None
        return wide.view(len(adapters), len(x), *wide.shape[1:])


def _stacked(factors: Sequence[Factors | None]) -> tuple[Tensor, Tensor]:
    """Updates of different ranks in two tensors, zeros where they are narrower."""
    some = [f for f in factors if f is not None]
    rank, like = max(f.rank for f in some), some[0]
    a = like.a.new_zeros(len(factors), rank, like.a.shape[1])
    b = like.b.new_zeros(len(factors), like.b.shape[0], rank)
    for i, f in enumerate(factors):
        if f is not None:
            a[i, : f.rank], b[i, :, : f.rank] = f.a * f.scaling, f.b
    return a, b
