"""The one vector on which resident programs work, and how it gets back to what was received."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedsim.core.records import FlatRecord

Build = Callable[[Tensor, bytes | None], None]
"""`build(flat, held)` makes the model in place: `flat` holds the initial values, or, with `held`,
the model of that name."""


class Resident:
    """A model's values in one vector that is changed in place and put back exactly.

    The module's parameters become views of it, so it takes no memory of its own. A process in
    which one client after another starts from the same model keeps a second vector, from the
    moment a model is needed for the second time; a device never does.

    Args:
        module: its parameters are moved into the vector.
        initial: the values at first; read-only.

    Attributes:
        flat: the vector, shape [layout.size].
        beside: entries that are not in the vector, by name.
    """

    def __init__(self, module: nn.Module, initial: FlatRecord) -> None:
        self._initial = initial
        self.flat = initial.flat.clone()
        self.beside = {n: t.clone() for n, t in initial.beside.items()}
        held = frozenset(initial.layout.order)
        for name, parameter in module.named_parameters():
            if name in held:
                parameter.data = initial.layout.view(self.flat, name)
        self._base: Tensor | None = None
        self._named: bytes | None = None  # what was last built; `_base`, if any, holds it
        self._clean = False

    @torch.no_grad()
    def restore(self, name: bytes | None, build: Build, incremental: bool = False) -> None:
        """Bring the vector to a model, whatever was done to it.

        Args:
            name: of the model: equal names mean equal models. None: not to be kept.
            build: makes it.
            incremental: let `build` start from the model that was kept before. Cheaper where
                little has changed, but then the last bits depend on what was asked for earlier.
        """
        for entry, value in self._initial.beside.items():
            self.beside[entry].copy_(value)
        if name is None or self._named is None:
            self._fresh(build)
        elif name == self._named:
            if self._base is not None:
                self.flat.copy_(self._base)
            elif not self._clean:
                self._fresh(build)
                self._base = self.flat.clone()
        elif incremental and self._base is not None:
            build(self._base, self._named)
            self.flat.copy_(self._base)
        else:
            self._fresh(build)
        if name is not None and name != self._named and (incremental or self._base is not None):
            self._base = torch.empty_like(self.flat) if self._base is None else self._base
            self._base.copy_(self.flat)
        self._named, self._clean = name, True

    def touch(self) -> None:
        """Say that the vector is about to be changed."""
        self._clean = False

    def _fresh(self, build: Build) -> None:
        self.flat.copy_(self._initial.flat)
        build(self.flat, None)
