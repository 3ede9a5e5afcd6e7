"""Judges and counts the replies of a whole cohort in columns, as `intake` does one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from fedsim.core.bulk import COMPUTE, EXAMPLES, Block, Replies
from fedsim.core.nodes import client_at
from fedsim.core.records import as_flat
from fedsim.gate import Gate, Refusal, one_line
from fedsim.intake import Judgements, Tally

T = TypeVar("T")
Floats = NDArray[np.float64]
Flops = Callable[[NDArray[Any], NDArray[np.int64]], Floats]
Seconds = Callable[[NDArray[np.int64], Any, int, int], Floats]
"""Simulated seconds of clients with such work, bytes received and bytes sent."""
Refused = Mapping[int, Refusal]


def sift(
    gate: Gate, block: Block, expected: Mapping[str, ArrayRecord], most: NDArray[np.int64]
) -> tuple[Block, dict[int, Refusal]]:
    """The rows of a block that the gate admits, and why it refuses the others, by node.

    Rows that are in order pass in columns; every other one goes through `Gate.check` by itself.

    Args:
        gate: the gate.
        block: the replies.
        expected: for each array record that must be there, one of the same layout.
        most: number of examples of each client, by partition number.
    """
    counts = block.metrics.get(EXAMPLES, np.zeros(len(block)))
    top = np.minimum(most[block.nodes - 1], gate.max_examples)
    good = (counts > 0) & (counts <= top) & (counts == np.floor(counts))
    for column in block.metrics.values():
        good &= np.isfinite(column)
    wanted = {name: as_flat(record).layout for name, record in expected.items()}
    if dict(block.layouts) != wanted or any(block.beside):
        good[:] = False
    for rows in block.rows.values():
        good &= (rows.bounds() <= gate.max_magnitude).cpu().numpy()
    if good.all():
        return block, {}
    refused = {}
    for row in np.flatnonzero(~good).tolist():
        node = int(block.nodes[row])
        try:
            gate.check(block.content(row), expected, int(most[client_at(node)]))
            good[row] = True
        except Refusal as refusal:
            refused[node] = refusal
    return block.take(np.flatnonzero(good)), refused


@dataclass(frozen=True)
class Verdicts:
    """What became of the replies of one block.

    Attributes:
        block: the admitted ones.
        refused: why others were refused, by node.
        faults: what went wrong on nodes that gave no reply, by node.
        bytes_each: payload of one reply, admitted or refused.
    """

    block: Block
    refused: Refused
    faults: Mapping[int, str]
    bytes_each: int


class Admitted(Replies):
    """The admitted replies of a cohort.

    Args:
        replies: all replies.
        judge: judges a block.
        note: told of every block's verdicts, in order.
        close: called at the end; it may raise.
    """

    def __init__(
        self,
        replies: Replies,
        judge: Callable[[Block], tuple[Block, dict[int, Refusal]]],
        note: Callable[[Verdicts], None],
        close: Callable[[], None],
    ) -> None:
        self._replies, self._judge, self._note, self._close = replies, judge, note, close
        self.nodes = replies.nodes

    def map(self, then: Callable[[Block], T], keep: bool = False) -> Iterator[T]:
        """See `Replies`."""

        def judged(block: Block) -> tuple[Verdicts, T | None]:
            passed, refused = self._judge(block)
            gone = {**block.faults, **{node: str(r) for node, r in refused.items()}}
            passed = replace(passed, faults=gone)
            verdicts = Verdicts(passed, refused, block.faults, block.bytes_each)
            return verdicts, then(passed) if len(passed) or keep else None

        for verdicts, result in self._replies.map(judged, keep):
            self._note(verdicts)
            if len(verdicts.block) or keep:
                yield result  # type: ignore[misc]
        self._close()

    def reply(self, node: int, said: RecordDict | str) -> Message | None:
        """See `Replies`: what was refused is left out."""
        return None if isinstance(said, str) else self._replies.reply(node, said)


def enter(tally: Tally, verdicts: Verdicts, down: int, took_by: Seconds, flops: Flops) -> float:
    """Note a block in the clients' rows; return the longest simulated seconds.

    Args:
        tally: the round's.
        verdicts: of the block.
        down: bytes that each client was sent.
        took_by: how long the clients' devices take.
        flops: operations of admitted rows, from their steps and examples, int64 [C] each.
    """
    block, up = verdicts.block, verdicts.bytes_each
    longest = 0.0
    gone = [(n, Refusal("error_reply", one_line(r)), 0) for n, r in verdicts.faults.items()]
    gone += [(node, refusal, up) for node, refusal in verdicts.refused.items()]
    for node, refusal, sent in gone:
        client = client_at(node)
        took = float(took_by(np.array([client]), 0.0, down, sent)[0])
        longest = max(longest, took)
        tally.refuse(client, refusal)
        _add(tally, client, down, sent, took)
    if not len(block):
        return longest
    examples = block.metrics[EXAMPLES].astype(np.int64)
    work = flops(block.metrics.get("steps", np.zeros(len(block))), examples)
    work = work * np.maximum(block.metrics.get(COMPUTE, np.ones(len(block))), 0.0)
    seconds = took_by(block.nodes - 1, work, down, up)
    columns: dict[str, list[Any]] = {"examples": examples.tolist()}
    if "loss" in block.metrics:
        columns["loss"] = block.metrics["loss"].astype(np.float64).tolist()
    if "cluster" in block.metrics:
        columns["cluster"] = block.metrics["cluster"].astype(np.int64).tolist()
    names = ("status", *columns, "bytes_down", "bytes_up", "seconds")
    for node, took, *values in zip(
        block.nodes.tolist(), seconds.tolist(), *columns.values(), strict=True
    ):
        client = client_at(node)
        row = tally.row(client)
        if "bytes_down" in row:  # a second phase of the round
            row.update(zip(names, ("ok", *values), strict=False))
            _add(tally, client, down, up, took)
        else:
            row.update(zip(names, ("ok", *values, down, up, took), strict=True))
    tally.sampled.update((block.nodes - 1).tolist())
    return max(longest, float(seconds.max()))


def _add(tally: Tally, client: int, down: int, up: int, seconds: float) -> None:
    tally.sampled.add(client)
    tally.add(client, bytes_down=down, bytes_up=up, seconds=seconds)


def judgements(replies: Replies, gate: Gate, examples: Sequence[int]) -> Iterator[Judgements]:
    """The judgements of all usable replies to evaluate messages.

    Args:
        replies: the replies.
        gate: judges them.
        examples: held-out examples of every client.
    """
    most = np.asarray(examples)
    for block, _ in replies.map(lambda block: sift(gate, block, {}, most)):
        counts = block.metrics[EXAMPLES].astype(np.int64)
        loss, accuracy = (block.metrics[n].astype(np.float64) for n in ("loss", "accuracy"))
        yield block.nodes - 1, counts, loss, accuracy
