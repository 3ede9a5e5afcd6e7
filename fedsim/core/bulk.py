"""Many messages at once: one content for many nodes, and replies in columns.

Both are ordinary collections of Flower messages for everybody who iterates over them. Those who
only need sums take the columns and spare the objects, which for small models cost more than the
training itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, overload

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.records import FlatRecord, Layout, record_bytes

T = TypeVar("T")
EXAMPLES = "num-examples"
"""Key of the number of training examples in a reply's metrics, as in Flower."""
COMPUTE = "compute"
"""Key of how much a step cost, relative to a forward and a backward pass of the model; 1 where a
reply does not say. It only sets simulated time."""


class Broadcast(Sequence[Message]):
    """One content for many nodes: a sequence of messages, made when somebody looks at one.

    Args:
        content: what every node is sent; each message gets a `RecordDict` of its own.
        message_type: type of the messages.
        nodes: node ids, ascending.
    """

    def __init__(self, content: RecordDict, message_type: str, nodes: Sequence[int]) -> None:
        self.content, self.message_type, self.nodes = content, message_type, nodes
        self._built: list[Message] | None = None

    @property
    def untouched(self) -> bool:
        """Whether nobody has had a message in hand, to change it perhaps."""
        return self._built is None

    def message_to(self, node: int) -> Message:
        """A message to one node."""
        own = RecordDict(
            {
                name: ConfigRecord(dict(r)) if isinstance(r, ConfigRecord) else r
                for name, r in self.content.items()
            }
        )
        return Message(own, dst_node_id=node, message_type=self.message_type)

    def _all(self) -> list[Message]:
        if self._built is None:
            self._built = [self.message_to(node) for node in self.nodes]
        return self._built

    @overload
    def __getitem__(self, index: int) -> Message: ...

    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...

    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        return self._all()[index]

    def __iter__(self) -> Iterator[Message]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self.nodes)


class Rows:
    """Vectors of several nodes, one in each row.

    Args:
        vectors: shape [C, size].
    """

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = vectors

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        return self._vectors.dtype

    def dense(self) -> Tensor:
        """The vectors, shape [C, size]."""
        return self._vectors

    def bounds(self) -> Tensor:
        """For each row a number that no entry exceeds, NaN or infinite if one of them is: [C]."""
        if not self.dtype.is_floating_point:
            return torch.zeros(len(self))
        return torch.linalg.vector_norm(self._vectors, dim=1)

    def mean(self, share: Tensor) -> Tensor:
        """Sum of the rows times `share` [C], which adds to 1; in memory of its own."""
        rows = self._vectors
        if rows.dtype not in (torch.float32, torch.float64):
            rows = rows.float()
        return share.to(rows) @ rows


@dataclass(frozen=True)
class Block:
    """Replies of several nodes in columns; row i belongs to ``nodes[i]``.

    Attributes:
        nodes: node ids, int64 [C].
        layouts: layout of each array record, by name.
        rows: the records' vectors, by name.
        metrics: the metrics by name, [C]; whole numbers as int64, others as float64.
        beside: for each row, entries of the record `arrays` that are not in its vector.
        faults: what went wrong on nodes that gave no row, by node.
        lasting: whether the vectors stay as they are after the block was handed on.
    """

    nodes: NDArray[np.int64]
    layouts: Mapping[str, Layout]
    rows: Mapping[str, Rows]
    metrics: Mapping[str, NDArray[Any]]
    beside: Sequence[Mapping[str, Tensor]] = ()
    faults: Mapping[int, str] = field(default_factory=dict)
    lasting: bool = True

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def examples(self) -> NDArray[np.float64]:
        """Training examples that each node reports."""
        return self.metrics[EXAMPLES].astype(np.float64)

    @property
    def bytes_each(self) -> int:
        """Payload bytes of one reply, as `count_bytes` counts them."""
        arrays = sum(record_bytes(layout) for layout in self.layouts.values())
        return arrays + sum(len(name) + 8 for name in self.metrics)

    def content(self, row: int) -> RecordDict:
        """The content of one reply."""
        records: dict[str, Any] = {
            name: FlatRecord(
                layout,
                self.rows[name].dense()[row],
                self.beside[row] if self.beside and name == "arrays" else None,
            )
            for name, layout in self.layouts.items()
        }
        metrics = {name: column[row].item() for name, column in self.metrics.items()}
        return RecordDict({**records, "metrics": MetricRecord(metrics)})

    def take(self, rows: NDArray[np.int64]) -> Block:
        """Only these rows."""
        index, dense = torch.from_numpy(rows), {n: v.dense() for n, v in self.rows.items()}
        return replace(
            self,
            nodes=self.nodes[rows],
            rows={n: Rows(v[index.to(v.device)]) for n, v in dense.items()},
            metrics={n: v[rows] for n, v in self.metrics.items()},
            beside=[self.beside[i] for i in rows.tolist()] if self.beside else (),
            lasting=True,
        )

    def mean(self, name: str, weights: NDArray[np.float64]) -> Tensor:
        """Weighted mean of a record's vectors, shape [layout.size], in memory of its own.

        Args:
            name: of the array record.
            weights: above 0, shape [C].
        """
        rows = self.rows[name]
        if len(rows) == 1 and self.lasting:
            return rows.dense()[0]
        return rows.mean(torch.from_numpy(weights / weights.sum()))


class Replies(Iterable[Message]):
    """Replies that come in blocks, once; iterating over them gives ordinary messages."""

    nodes: Sequence[int]
    """Who was asked, ascending."""

    @abstractmethod
    def map(self, then: Callable[[Block], T], keep: bool = False) -> Iterator[T]:
        """Yield `then` of every block, in a fixed order.

        Args:
            then: called where the block was produced, on any thread.
            keep: whether its vectors are needed after `then` has returned.
        """

    @abstractmethod
    def reply(self, node: int, said: RecordDict | str) -> Message | None:
        """The message of a node that said this, or with which this went wrong."""

    def each(self) -> Iterator[tuple[int, RecordDict | str]]:
        """Node by node, in order, what it said or what went wrong.

        A block is held until its last row was taken.
        """
        blocks = self.map(lambda block: block, keep=True)
        waiting: dict[int, tuple[Block, int]] = {}
        faults: dict[int, str] = {}
        for node in self.nodes:
            while node not in waiting and node not in faults:
                block = next(blocks, None)
                if block is None:
                    return
                waiting.update({int(n): (block, i) for i, n in enumerate(block.nodes)})
                faults.update(block.faults)
            if node in faults:
                yield node, faults.pop(node)
            else:
                block, row = waiting.pop(node)
                yield node, block.content(row)
        for _ in blocks:  # the end of the stream may have something to say
            pass

    def __iter__(self) -> Iterator[Message]:
        """The replies in order of nodes."""
        for node, said in self.each():
            message = self.reply(node, said)
            if message is not None:
                yield message
