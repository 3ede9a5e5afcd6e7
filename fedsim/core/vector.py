"""The one vector on which resident programs work, and how it gets back to what was received."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.core.errors import RunError
from fedsim.core.records import FlatRecord

Build = Callable[[Tensor, bytes | None], None]
"""`build(flat, held)` makes the model in place: `flat` holds the initial values, or, with `held`,
the model of that name."""

LARGE = 1 << 26
"""Bytes from which a copy of a vector goes into a file."""


class Copy:
    """A copy of a vector: in memory if it is small, else in a file without a name.

    What lies in the file takes no memory of the process; the kernel caches it where memory is
    free. Vectors on other devices than the CPU stay there.

    Args:
        like: a vector of the same size, dtype and device; not copied yet.

    Raises:
        RunError: the folder for temporary files cannot take it.
    """

    def __init__(self, like: Tensor) -> None:
        self._dtype, self._size = like.dtype, like.numel()
        self._file = None
        if like.device.type == "cpu" and like.nbytes >= LARGE:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        else:
            self._kept = torch.empty_like(like)

    def put(self, vector: Tensor) -> None:
        """Copy from a vector."""
        if self._file is None:
            self._kept.copy_(vector)
            return
        data, done = _bytes(vector), 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], done)
        except OSError as error:
            raise RunError(
                f"{tempfile.gettempdir()} cannot hold a model of {len(data):,} bytes: "
                f"{error.strerror}; name a folder with room for it in TMPDIR"
            ) from None

    def get(self, vector: Tensor) -> None:
        """Copy into a vector."""
        if self._file is None:
            vector.copy_(self._kept)
            return
        data, done = _bytes(vector), 0
        while done < len(data):
            done += os.preadv(self._file.fileno(), [data[done:]], done)
        torch.autograd.graph.increment_version(vector)

    def view(self) -> Tensor:
        """The copy as a vector; pages of a file come into memory when they are read."""
        if self._file is None:
            return self._kept
        raw = np.memmap(self._file, np.uint8, "c")  # private: writing would not reach the file
        return torch.from_numpy(raw).view(self._dtype)


def _bytes(vector: Tensor) -> memoryview:
    return vector.detach().view(torch.uint8).numpy().data.cast("B")


class Resident:
    """A model's values in one vector that is changed in place and put back exactly.

    A module's parameters become views of it, so it takes no memory of its own. The initial values,
    and the model that one client after another starts from, are kept beside it as `Copy`: a large
    model is in memory once, however many clients there are. Programs and the server share it: each
    says which model it needs, and whoever comes next finds that one, whatever was done before.

    Args:
        initial: the values at first; read-only.
        module: its parameters are moved into the vector; None: there is none.
        flat: the vector, if it holds the initial values already; else a new one is made.
        origin: the initial values, if they are copied already.

    Attributes:
        flat: the vector, shape [layout.size].
        beside: entries that are not in the vector, by name.
    """

    def __init__(
        self,
        initial: FlatRecord,
        module: nn.Module | None = None,
        flat: Tensor | None = None,
        origin: Copy | None = None,
    ) -> None:
        self._initial, self._origin = initial, origin
        self.flat = initial.flat.clone() if flat is None else flat
        self.beside = {n: t.clone() for n, t in initial.beside.items()}
        if module is not None and flat is None:
            bind(module, initial, self.flat)
        self._base: Copy | None = None
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
        if name is not None and name == self._named:
            if not self._clean and self._base is not None:
                self._base.get(self.flat)
            elif not self._clean:
                self._fresh(build)
                self._keep()
        elif name is not None and incremental and self._base and self._named is not None:
            if not self._clean:
                self._base.get(self.flat)
            build(self.flat, self._named)
            self._keep()
        else:
            self._fresh(build)
            if name is not None and (incremental or self._base is not None):
                self._keep()
        self._named, self._clean = name, True

    def touch(self) -> None:
        """Say that the vector is about to be changed."""
        self._clean = False

    def _fresh(self, build: Build) -> None:
        if self._origin is None:
            self.flat.copy_(self._initial.flat)
        else:
            self._origin.get(self.flat)
        build(self.flat, None)

    def _keep(self) -> None:
        self._base = Copy(self.flat) if self._base is None else self._base
        self._base.put(self.flat)


def bind(module: nn.Module, record: FlatRecord, flat: Tensor) -> None:
    """Make a module's parameters views of a vector of the record's layout."""
    held = frozenset(record.layout.order)
    for name, parameter in module.named_parameters():
        if name in held:
            parameter.data = record.layout.view(flat, name)


def parked(
    module: nn.Module, record: FlatRecord, beside: Mapping[str, Tensor]
) -> tuple[FlatRecord, Resident | None]:
    """Initial values that take no memory if they are large, and the vector that then holds them.

    Args:
        module: of which they are the values; a large one's parameters become views of the vector.
        record: the values in a vector that nobody else uses.
        beside: entries outside the vector.
    """
    if record.flat.device.type != "cpu" or record.flat.nbytes < LARGE:
        return record, None
    origin = Copy(record.flat)
    origin.put(record.flat)
    initial = FlatRecord(record.layout, origin.view(), beside)
    bind(module, record, record.flat)
    return initial, Resident(initial, None, record.flat, origin)
