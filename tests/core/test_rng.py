"""Named random streams: the same everywhere, and each by itself."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core import rng

seeds = st.integers(-(2**63), 2**63 - 1)
rounds = st.integers(0, 10**6)
clients = st.integers(rng.SERVER, 10**6)


def test_the_stream_is_philox_keyed_by_blake2b_of_the_four_names() -> None:
    name = struct.pack("<qqq", 7, 3, 12) + b"batches"
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    expected = np.random.Generator(np.random.Philox(key=key)).integers(0, 1000, 5)
    assert rng.stream(7, 3, 12, "batches").integers(0, 1000, 5).tolist() == expected.tolist()


def test_the_bits_never_change() -> None:
    # What every platform and release must draw; a change breaks every published result.
    assert rng.key(0, 1, 2, "batches") == 0x6703FF1FFB015520527CEDD02B8567F5
    assert rng.stream(0, 1, 2, "batches").integers(0, 2**63, 2).tolist() == [
        7096252753379057649,
        8703718051918473450,
    ]


@given(seeds, rounds, clients)
def test_a_stream_starts_anew_each_time(seed: int, round: int, client: int) -> None:
    first, second = (rng.stream(seed, round, client, "x").random(4) for _ in range(2))
    assert first.tolist() == second.tolist()


@given(st.lists(st.tuples(seeds, rounds, clients, st.text(max_size=5)), min_size=2, unique=True))
def test_different_names_have_different_keys(names: list[tuple[int, int, int, str]]) -> None:
    assert len({rng.key(*name) for name in names}) == len(names)


def test_torch_generators_follow_the_name() -> None:
    draws = [
        torch.rand(3, generator=rng.torch_generator(1, 1, client, "noise")).tolist()
        for client in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_isolated_seeds_inside_and_restores_outside() -> None:
    before = torch.default_generator.get_state()
    with rng.isolated(5):
        first = torch.nn.Linear(2, 2).weight
    with rng.isolated(5):
        assert torch.equal(first, torch.nn.Linear(2, 2).weight)
    with pytest.raises(ZeroDivisionError), rng.isolated(5):
        raise ZeroDivisionError
    assert torch.equal(before, torch.default_generator.get_state())
