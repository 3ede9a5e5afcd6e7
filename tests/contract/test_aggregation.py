"""What an aggregate is: a fixed point, canonical, free of scale, and the simpler algorithm's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedsim.core.averaging import EXAMPLES, metrics_of
from fedsim.core.records import as_flat
from fedsim.core.strategy import Strategy
from fedsim.federation import Federation, Progress
from tests.contract import toy
from tests.contract.rows import PAIRS, ROWS, Pair, Row, every


def aggregate(
    strategy: Strategy, messages: Sequence[Message], contents: Sequence[RecordDict], round: int
) -> ArrayRecord:
    """What the strategy makes of these replies to these messages."""
    replies = [Message(c, reply_to=m) for m, c in zip(messages, contents, strict=True)]
    arrays, _ = strategy.aggregate_train(round, iter(replies))
    assert arrays is not None
    return arrays


def with_examples(content: RecordDict, count: Callable[[int], int]) -> RecordDict:
    """A copy of a reply's content with another number of examples."""
    metrics = metrics_of(content)
    changed = MetricRecord({**metrics, EXAMPLES: count(int(metrics[EXAMPLES]))})  # type: ignore[call-overload]
    return RecordDict({**content, "metrics": changed})


def after(
    row: Row, rounds: int, **options: Any
) -> tuple[Federation, Progress, list[Message], list[RecordDict]]:
    """A federation after some rounds, with messages and replies of the next."""
    fed = row.federation(**options)
    progress = fed.begin()
    for _ in range(rounds):
        fed.advance(progress)
    messages = toy.messages_of(fed, progress.arrays, rounds + 1)
    return fed, progress, messages, toy.contents_of(fed, messages)


def client_model(fed: Federation, sent: ArrayRecord, content: RecordDict) -> ArrayRecord:
    """The client's model in a reply: what it sent, or what it was sent plus its update."""
    reply = as_flat(content.array_records["arrays"])
    (program,) = fed.env.programs.values()
    if program.replies == "model":
        return reply
    return reply.with_flat(as_flat(sent, reply.layout).flat + reply.flat)


STEADY = [row for row in ROWS if not row.optimises and not row.packed]


EARLY_AND_LATE = pytest.mark.parametrize("rounds", [0, 2], ids=["first round", "third round"])


@EARLY_AND_LATE
@every(STEADY)
def test_identical_replies_give_that_reply_back(row: Row, rounds: int) -> None:
    fed, progress, messages, contents = after(row, rounds)
    same = [with_examples(contents[0], lambda _, n=n: n) for n in toy.SIZES]  # type: ignore[misc]
    arrays = aggregate(fed.strategy, messages, same, rounds + 1)
    assert toy.close(arrays, client_model(fed, progress.arrays, contents[0]), row.rounding)


@EARLY_AND_LATE
@every([row for row in STEADY if row.fewest == 1])
def test_one_client_alone_is_local_training(row: Row, rounds: int) -> None:
    fed, progress, messages, contents = after(row, rounds, data=toy.federated(toy.SIZES[:1]))
    arrays = aggregate(fed.strategy, messages, contents, rounds + 1)
    assert toy.close(arrays, client_model(fed, progress.arrays, contents[0]), row.rounding)


@every()
def test_any_order_of_arrival_gives_the_same_bits(row: Row) -> None:
    expected = toy.sha256(toy.run(row.federation(), 2).arrays)
    for seed in range(4):
        fed = row.federation(wrap=lambda grid, seed=seed: toy.Shuffled(grid, seed))
        assert toy.sha256(toy.run(fed, 2).arrays) == expected


def with_and_without(
    row: Row, change: Callable[[list[RecordDict]], list[RecordDict]]
) -> tuple[ArrayRecord, ArrayRecord]:
    """The third round's aggregate, with the replies changed and as they are."""
    results = []
    for changed in (True, False):
        fed, _, messages, contents = after(row, 2)
        contents = change(contents) if changed else contents
        results.append(aggregate(fed.strategy, messages, contents, 3))
    return results[0], results[1]


@every()
def test_relabelling_clients_changes_nothing(row: Row) -> None:
    order = np.random.default_rng(3).permutation(len(toy.SIZES))
    relabelled, expected = with_and_without(row, lambda contents: [contents[i] for i in order])
    assert toy.close(relabelled, expected, 1e-6)


@pytest.mark.parametrize(("factor", "tolerance"), [(4, 0.0), (3, 1e-6)])
@every()
def test_the_scale_of_example_counts_is_nothing(row: Row, factor: int, tolerance: float) -> None:
    scaled, expected = with_and_without(
        row, lambda contents: [with_examples(c, lambda n: n * factor) for c in contents]
    )
    assert toy.close(scaled, expected, tolerance)


@pytest.mark.parametrize("pair", PAIRS, ids=[p.id for p in PAIRS])
def test_degenerate_parameters_reduce_to_the_simpler_algorithm(pair: Pair) -> None:
    one, other = (
        toy.run(row.federation(**pair.options()), pair.rounds).arrays
        for row in (pair.one, pair.other)
    )
    assert toy.close(one, other, pair.tolerance)
