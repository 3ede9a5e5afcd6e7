"""What an aggregate is: a fixed point, canonical, free of scale, and the simpler algorithm's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedsim.core.averaging import EXAMPLES, metrics_of
from fedsim.core.packing import pack, unpack
from fedsim.core.parts import widened
from fedsim.core.records import as_flat, from_record, to_record
from fedsim.core.strategy import Strategy
from fedsim.federation import Federation, Progress
from tests.contract import toy
from tests.contract.rows import PAIRS, ROWS, Pair, Row, every, honest


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
    if program.replies == "model":  # what it left out is as it was sent, or zeros
        held = from_record(sent)
        return to_record(
            held | {n: widened(t, held[n].shape) for n, t in from_record(reply).items()}
        )
    return reply.with_flat(as_flat(sent, reply.layout).flat + reply.flat)


def agree(row: Row, fed: Federation, one: ArrayRecord, other: ArrayRecord) -> bool:
    """Whether two models agree: in their parameters, or in what they say of every example."""
    if not row.refactors:
        return toy.close(one, other, row.rounding)
    said = []
    for record in (one, other):
        held = as_flat(record, fed.env.model.layout)
        said.append(fed.env.model.outputs(held.flat, dict(held.beside), fed.env.data.fields["x"]))
    return bool((said[0] - said[1]).abs().max() <= row.rounding * said[1].abs().max())


STEADY = [row for row in ROWS if not row.optimises and not row.packed]


EARLY_AND_LATE = pytest.mark.parametrize("rounds", [0, 2], ids=["first round", "third round"])


@EARLY_AND_LATE
@every(STEADY)
def test_identical_replies_give_that_reply_back(row: Row, rounds: int) -> None:
    fed, progress, messages, contents = after(row, rounds)
    same = [with_examples(contents[0], lambda _, n=n: n) for n in toy.SIZES]  # type: ignore[misc]
    arrays = aggregate(fed.strategy, messages, same, rounds + 1)
    assert agree(row, fed, arrays, client_model(fed, progress.arrays, contents[0]))


@EARLY_AND_LATE
@every([row for row in STEADY if row.fewest == 1])
def test_one_client_alone_is_local_training(row: Row, rounds: int) -> None:
    fed, progress, messages, contents = after(row, rounds, data=toy.federated(toy.SIZES[:1]))
    arrays = aggregate(fed.strategy, messages, contents, rounds + 1)
    assert agree(row, fed, arrays, client_model(fed, progress.arrays, contents[0]))


@every()
def test_any_order_of_arrival_gives_the_same_bits(row: Row) -> None:
    for seed in range(2):
        fed = row.federation(wrap=lambda grid, seed=seed: toy.Shuffled(grid, seed))
        assert toy.sha256(toy.run(fed, 2).arrays) == honest(row)


@cache
def third_round(row: Row) -> tuple[ArrayRecord, bytes, list[RecordDict]]:
    """After two rounds: what the server holds, the strategy's state, and the third's replies."""
    fed = row.federation()
    progress = toy.run(fed, 2)
    state = pack({"state": fed.strategy.state_dict()})
    return progress.arrays, state, toy.contents_of(fed, toy.messages_of(fed, progress.arrays, 3))


def third(row: Row, change: Callable[[list[RecordDict]], list[RecordDict]]) -> ArrayRecord:
    """The third round's aggregate, with its replies changed."""
    arrays, state, contents = third_round(row)
    fed = row.federation()
    fed.strategy.load_state_dict(unpack(state)["state"])
    messages = toy.messages_of(fed, arrays, 3)
    return aggregate(fed.strategy, messages, change(contents), 3)


@every()
def test_relabelling_clients_and_scaling_their_counts_change_nothing(row: Row) -> None:
    expected = third(row, lambda contents: contents)
    order = np.random.default_rng(3).permutation(len(toy.SIZES))
    assert toy.close(third(row, lambda contents: [contents[i] for i in order]), expected, 1e-6)
    for factor, tolerance in ((4, 0.0), (3, 1e-6)):
        scaled = third(
            row,
            lambda contents, f=factor: [with_examples(c, lambda n: n * f) for c in contents],  # type: ignore[misc]
        )
        assert toy.close(scaled, expected, tolerance), f"counts times {factor}"


@pytest.mark.parametrize("pair", PAIRS, ids=[p.id for p in PAIRS])
def test_degenerate_parameters_reduce_to_the_simpler_algorithm(pair: Pair) -> None:
    one, other = (
        toy.run(row.federation(**pair.options()), pair.rounds).arrays
        for row in (pair.one, pair.other)
    )
    assert toy.close(one, other, pair.tolerance)
