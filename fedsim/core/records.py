"""Model states as Flower records, without copies inside one process.

A model's floating-point entries live in one flat vector (`Layout`); a `FlatRecord` is an
`ArrayRecord` whose entries are views of that vector and are only built when somebody asks for
them. Any Flower code can read it; code of this package takes the vector. `materialise` turns such
records into plain Flower ones before they leave the process.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

NPY = "numpy.ndarray"
BFLOAT16 = "bfloat16"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=4096)
def _npy_header_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Length in bytes of the header that `numpy.save` writes for such an array."""
    descr = np.dtype("uint16" if dtype == BFLOAT16 else dtype)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": descr.str, "fortran_order": False, "shape": shape}
    )
    return buffer.tell()


class TensorArray(Array):
    """A Flower `Array` that holds a tensor and serialises it only when `data` is read.

    bfloat16, which NumPy lacks, travels as the same bits in a uint16 array with
    ``dtype == "bfloat16"``.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.dtype = _dtype_name(tensor.dtype)
        self.shape = tuple(tensor.shape)
        self.stype = NPY

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The bytes `numpy.save` writes."""
        buffer = io.BytesIO()
        np.save(buffer, self._storage(), allow_pickle=False)
        return buffer.getvalue()

    @property
    def nbytes(self) -> int:
        """Length of `data` in bytes, without building it."""
        return _npy_header_bytes(self.dtype, self.shape) + (
            self.tensor.numel() * self.tensor.element_size()
        )

    def numpy(self) -> Any:
        """The array itself (shared memory); bfloat16 comes as float32."""
        tensor = self.tensor.cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def _storage(self) -> np.ndarray:
        tensor = self.tensor.contiguous().cpu()
        return (
            tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        )


def to_tensor(array: Array) -> Tensor:
    """The tensor an `Array` holds; shares memory where the array holds a tensor already."""
    if isinstance(array, TensorArray):
        return array.tensor
    tensor = torch.from_numpy(np.ascontiguousarray(array.numpy())).reshape(array.shape)
    return tensor.view(torch.bfloat16) if array.dtype == BFLOAT16 else tensor


@dataclass(frozen=True)
class Layout:
    """Where each entry of a model state lies in the flat vector.

    Attributes:
        names: every entry, in `state_dict` order, which is the order on the wire.
        shapes: shape of each entry.
        dtypes: dtype of each entry.
        dtype: dtype of the flat vector; entries of other dtypes stay beside it.
        order: names of the flat entries in the order of the vector, trainable ones first.
        num_trainable: length of the trainable prefix of the vector.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    order: tuple[str, ...]
    num_trainable: int
    _spans: dict[str, tuple[int, int, tuple[int, ...]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        shapes = dict(zip(self.names, self.shapes, strict=True))
        offset = 0
        for name in self.order:
            length = math.prod(shapes[name])
            self._spans[name] = (offset, length, shapes[name])
            offset += length

    @cached_property
    def size(self) -> int:
        """Number of elements of the flat vector."""
        return sum(length for _, length, _ in self._spans.values())

    @cached_property
    def trainable(self) -> tuple[str, ...]:
        """Names of the trainable entries, in vector order."""
        return tuple(n for n in self.order if self._spans[n][0] < self.num_trainable)

    @cached_property
    def trained(self) -> Layout:
        """The layout of the trainable entries alone: that of a program's vectors."""
        return self.restrict(frozenset(self.trainable))

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """Names of the entries that are not in the vector (integer buffers, other dtypes)."""
        return tuple(n for n in self.names if n not in self._spans)

    def span(self, name: str) -> slice:
        """The slice of the flat vector that holds the entry."""
        offset, length, _ = self._spans[name]
        return slice(offset, offset + length)

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The entry as a view of `flat`; leading axes of `flat` stay in front."""
        offset, length, shape = self._spans[name]
        return flat.narrow(-1, offset, length).view((*flat.shape[:-1], *shape))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """All entries of the vector as views, in vector order."""
        return {name: self.view(flat, name) for name in self.order}

    def flatten(self, state: Mapping[str, Tensor]) -> Tensor:
        """Copy the vector's entries of `state` into a new flat vector of shape [size]."""
        flat = torch.empty(self.size, dtype=self.dtype)
        for name in self.order:
            offset, length, _ = self._spans[name]
            flat[offset : offset + length] = state[name].detach().reshape(-1)
        return flat

    def restrict(self, names: frozenset[str]) -> Layout:
        """The layout of the entries in `names` only, in the same order."""
        keep = [i for i, name in enumerate(self.names) if name in names]
        order = tuple(n for n in self.order if n in names)
        return Layout(
            tuple(self.names[i] for i in keep),
            tuple(self.shapes[i] for i in keep),
            tuple(self.dtypes[i] for i in keep),
            self.dtype,
            order,
            sum(self._spans[n][1] for n in self.trainable if n in names),
        )

    @staticmethod
    def of(state: Mapping[str, Tensor], trainable: frozenset[str] | None = None) -> Layout:
        """The layout of a state. `trainable`: names of the trainable entries (default: all)."""
        floats = [n for n, t in state.items() if t.is_floating_point()]
        first = [n for n in floats if trainable is None or n in trainable]
        dtype = state[(first or floats)[0]].dtype if floats else torch.float32
        in_vector = [n for n in first if state[n].dtype == dtype]
        rest = [n for n in floats if n not in set(first) and state[n].dtype == dtype]
        return Layout(
            tuple(state),
            tuple(tuple(t.shape) for t in state.values()),
            tuple(t.dtype for t in state.values()),
            dtype,
            (*in_vector, *rest),
            sum(state[n].numel() for n in in_vector),
        )


class _Entries(MutableMapping[str, Array]):
    """The lazily built dictionary inside a `FlatRecord`."""

    def __init__(self, record: FlatRecord) -> None:
        self._record, self._built = record, cast("dict[str, Array] | None", None)

    def _fill(self) -> dict[str, Array]:
        if self._built is None:
            flat, layout = self._record.flat, self._record.layout
            beside = self._record.beside
            self._built = {
                name: TensorArray(beside[name] if name in beside else layout.view(flat, name))
                for name in layout.names
            }
        return self._built

    def __getitem__(self, key: str) -> Array:
        return self._fill()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._record.layout.names if self._built is None else self._built)

    def __len__(self) -> int:
        return len(self._record.layout.names if self._built is None else self._built)

    def __setitem__(self, key: str, value: Array) -> None:
        raise TypeError("a FlatRecord is read-only; build a new record instead")

    def __delitem__(self, key: str) -> None:
        raise TypeError("a FlatRecord is read-only; build a new record instead")

    def copy(self) -> dict[str, Array]:
        return dict(self._fill())


class FlatRecord(ArrayRecord):
    """A model state whose entries are views of one flat vector. Read-only.

    Attributes:
        layout: where each entry lies.
        flat: tensor of shape [layout.size].
        beside: entries that are not in the vector, by name.
    """

    layout: Layout
    flat: Tensor
    beside: dict[str, Tensor]

    def __init__(
        self, layout: Layout, flat: Tensor, beside: Mapping[str, Tensor] | None = None
    ) -> None:
        fields = self.__dict__
        fields["layout"] = layout
        fields["flat"] = flat
        fields["beside"] = beside or {}
        fields["_check_key_fn"] = fields["_check_value_fn"] = _read_only
        fields["_data"] = _Entries(self)

    def state(self) -> dict[str, Tensor]:
        """The entries as tensors in `state_dict` order; vector entries are views."""
        return {
            name: self.beside[name] if name in self.beside else self.layout.view(self.flat, name)
            for name in self.layout.names
        }

    def with_flat(self, flat: Tensor, beside: Mapping[str, Tensor] | None = None) -> FlatRecord:
        """The same layout with another vector (and other entries beside it)."""
        return FlatRecord(self.layout, flat, self.beside if beside is None else beside)

    def copy(self) -> ArrayRecord:  # type: ignore[override]
        """A plain record with the same arrays."""
        return plain(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayRecord, (dict(plain(self)),)


def _read_only(_: object) -> None:
    raise TypeError("a FlatRecord is read-only; build a new record instead")


def to_record(state: Mapping[str, Tensor], trainable: frozenset[str] | None = None) -> FlatRecord:
    """Pack a state (name -> tensor) into a record; copies the tensors into one vector."""
    layout = Layout.of(state, trainable)
    beside = {name: state[name].detach().clone() for name in layout.beside}
    return FlatRecord(layout, layout.flatten(state), beside)


def from_record(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of any `ArrayRecord`, by name; shares memory where it can."""
    if isinstance(record, FlatRecord):
        return record.state()
    return {name: to_tensor(array) for name, array in record.items()}


def as_flat(record: ArrayRecord, layout: Layout | None = None) -> FlatRecord:
    """Any `ArrayRecord` as a `FlatRecord`.

    Args:
        record: names, shapes and dtypes must be those of `layout` where it is given.
        layout: the layout to use; default: one made from the record, everything trainable.
    """
    if isinstance(record, FlatRecord) and (layout is None or record.layout == layout):
        return record
    state = from_record(record)
    if layout is None:
        return to_record(state)
    return FlatRecord(layout, layout.flatten(state), {n: state[n] for n in layout.beside})


def plain(record: ArrayRecord) -> ArrayRecord:
    """A record of plain Flower arrays, serialised now, that any process can read."""
    return ArrayRecord(
        {k: Array(a.dtype, tuple(a.shape), a.stype, a.data) for k, a in record.items()}
    )


def materialise(content: RecordDict) -> RecordDict:
    """`content` with every array record made plain, ready to leave the process."""
    return RecordDict(
        {k: plain(v) if isinstance(v, ArrayRecord) else v for k, v in content.items()}
    )


def array_bytes(array: Array) -> int:
    """Bytes of one array as serialised."""
    return array.nbytes if isinstance(array, TensorArray) else len(array.data)


@lru_cache(maxsize=256)
def record_bytes(layout: Layout) -> int:
    """Bytes of a record of this layout: headers, values and names."""
    return sum(
        _npy_header_bytes(_dtype_name(dtype), shape)
        + math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        + len(name)
        for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True)
    )


def _value_bytes(value: object) -> int:
    if isinstance(value, (list, tuple)):
        return sum(_value_bytes(v) for v in value)
    if isinstance(value, (str, bytes)):
        return len(value.encode() if isinstance(value, str) else value)
    return 1 if isinstance(value, bool) else 8


def count_bytes(content: RecordDict) -> int:
    """Payload bytes of a message as it would be serialised.

    Arrays count as the bytes of `numpy.save`, numbers as 8, booleans as 1, strings and bytes as
    their length; names count as their length. (`ConfigRecord.count_bytes` of Flower 1.41 raises
    on an empty list, so it is not used.)
    """
    total = 0
    for record in content.values():
        if isinstance(record, FlatRecord):
            total += record_bytes(record.layout)
        elif isinstance(record, ArrayRecord):
            total += sum(len(name) + array_bytes(array) for name, array in record.items())
        else:
            total += sum(len(name) + _value_bytes(value) for name, value in record.items())
    return total
