"""Parts of a model: some of its entries, and of an entry the first places of each axis.

A client of low rank holds the first rows of one matrix and the first columns of another; that is
all that travels, and it is put back into place, with zeros around it, where the model is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedsim.core.records import FlatRecord, Layout

Shapes = Mapping[str, Sequence[int]]
"""Shape of each entry of a part, by name; an entry that is not there is not in the part."""


def shapes_of(record: ArrayRecord) -> dict[str, tuple[int, ...]]:
    """The shape of each entry of a record."""
    if isinstance(record, FlatRecord):
        return dict(zip(record.layout.names, record.layout.shapes, strict=True))
    return {name: tuple(array.shape) for name, array in record.items()}


def fits(shapes: Shapes, layout: Layout) -> bool:
    """Whether shapes are those of a part: known names, as many axes, none of them longer."""
    whole = dict(zip(layout.names, layout.shapes, strict=True))
    return all(
        name in whole
        and len(shape) == len(whole[name])
        and all(s <= w for s, w in zip(shape, whole[name], strict=True))
        for name, shape in shapes.items()
    )


def part_of(layout: Layout, shapes: Shapes) -> Layout:
    """The layout of a part; the layout itself if the part is everything."""
    names = tuple(n for n in layout.names if n in shapes)
    cut = tuple(tuple(shapes[n]) for n in names)
    if (names, cut) == (layout.names, layout.shapes):
        return layout
    dtypes = dict(zip(layout.names, layout.dtypes, strict=True))
    order = tuple(n for n in layout.order if n in shapes)
    sizes = {n: int(torch.Size(shapes[n]).numel()) for n in order}
    trained = sum(sizes[n] for n in layout.trainable if n in shapes)
    return Layout(names, cut, tuple(dtypes[n] for n in names), layout.dtype, order, trained)


def narrowed(rows: Tensor, layout: Layout, part: Layout) -> Tensor:
    """The part of vectors of shape [..., layout.size], of shape [..., part.size]."""
    if part is layout:
        return rows
    shapes, lead = dict(zip(part.names, part.shapes, strict=True)), rows.shape[:-1]
    pieces = []
    for name in part.order:
        piece = layout.view(rows, name)
        for axis, length in enumerate(shapes[name], len(lead)):
            piece = piece.narrow(axis, 0, length)
        pieces.append(piece.reshape(*lead, -1))
    return torch.cat(pieces, -1) if pieces else rows[..., :0].clone()


def narrow(record: FlatRecord, part: Layout) -> FlatRecord:
    """The part of a record; entries beside the vector are taken whole."""
    if part is record.layout:
        return record
    beside = {n: record.beside[n] for n in part.beside}
    return FlatRecord(part, narrowed(record.flat, record.layout, part), beside)


def widened(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor in the first places of zeros of that shape."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    out = tensor.new_zeros(*shape)
    out[tuple(slice(s) for s in tensor.shape)] = tensor
    return out


def widen(record: FlatRecord, like: FlatRecord) -> FlatRecord:
    """A part put into place: zeros around entries that are narrower, `like` where it has none."""
    layout = like.layout
    if record.layout is layout:
        return record
    flat, beside = like.flat.clone(), dict(like.beside)
    for name, tensor in record.state().items():
        if name in record.beside:
            beside[name] = tensor
            continue
        into = layout.view(flat, name)
        into.copy_(widened(tensor, into.shape))
    return FlatRecord(layout, flat, beside)
