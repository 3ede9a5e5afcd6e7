"""FedKSeed under hostile packets, from its ledger alone, and rebuilt in steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from safetensors.torch import load_file

from fedsim.config import StrategyConfig
from fedsim.core import directions, kseed
from fedsim.core.directions import arrays
from fedsim.core.errors import RunError
from fedsim.core.packets import packet, packet_of
from fedsim.core.records import as_flat
from fedsim.federation import Federation
from fedsim.ledger import Ledger
from fedsim.rebuild import rebuild
from fedsim.runner import LEDGER, Run, Task
from tests.contract import toy

PARAMS: dict[str, Any] = {"pool": 64, "steps": 12, "lr": 0.02, "eps": 1e-3}


def entry(name: str = "fedkseed", **params: Any) -> StrategyConfig:
    return StrategyConfig(name=name, params=PARAMS | params)


def federation(name: str = "fedkseed", options: Any = None, **params: Any) -> Federation:
    return toy.federation(entry(name, **params), **{"model": "mlp", **(options or {})})


def hostile(change: Callable[[bytes, int], bytes]) -> Callable[[Message, Message], list[Message]]:
    def answer(message: Message, reply: Message) -> list[Message]:
        current = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        data = change(packet_of(reply.content.array_records["arrays"]), current)
        content = RecordDict({**reply.content, "arrays": packet(data)})
        return [Message(content, reply_to=message)]

    return answer


def forged(pairs: list[kseed.Pair], shift: int = 0) -> Callable[[bytes, int], bytes]:
    return lambda data, current: kseed.pack_up(current + shift, 1, pairs, 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (forged([(64, 1.0)]), "outside the pool"),
        (forged([(1, 1.0)], -1), "round"),
        (forged([(1, float("nan"))]), "NaN"),
        (forged([(1, float("inf"))]), "NaN"),
        (forged([(1, 1e30)]), "beyond"),
        (forged([(1, 1.0)] * 13), "wrong_shape"),
        (lambda data, _: data[:-1], "pairs"),
        (lambda data, _: data[:10], "header"),
        (lambda data, _: b"", "header"),
        (lambda data, _: b"PK" + data[2:], "packet"),
    ],
    ids=["pool", "round", "nan", "inf", "huge", "count", "cut", "short", "empty", "magic"],
)
def test_a_hostile_packet_is_refused_alone(change: Any, reason: str) -> None:
    fed = federation(options={"wrap": lambda g: toy.Unreliable(g, (2,), hostile(change))})
    progress = toy.run(fed, 2)
    assert [r["refused"] for r in progress.rounds] == [0, 1, 1]
    bad = [r for r in progress.clients if r["client"] == 1 and r["round"] == 1]
    assert reason in bad[0]["reason"]
    clean = federation()
    clean.trainers = [n for n in clean.trainers if n != 2]
    assert toy.sha256(toy.run(clean, 2).arrays) == toy.sha256(progress.arrays)


def test_scalars_can_be_clipped_by_the_server() -> None:
    change = forged([(5, 1e5)])
    wrap = lambda g: toy.Unreliable(g, (2,), hostile(change))  # noqa: E731
    fed = federation(scalar_clip=2.0, options={"wrap": wrap})
    assert float(as_flat(toy.run(fed, 1).arrays).flat.abs().max()) < 5


def test_another_model_or_stream_is_refused() -> None:
    fed = federation()
    message = toy.messages_of(fed, fed.begin().arrays, 1)[0]
    message.content.config_records["config"]["layout"] = "0" * 16
    grid: Any = fed.grid
    reply = grid.execute(message)
    assert reply.has_error()
    assert "layout" in reply.error.reason


def executed(folder: Path, name: str = "fedkseed") -> Any:
    env = toy.environment(["fedkseed"], model="mlp")
    task = Task(toy.experiment(entry(name)), entry(name), toy.SEED, folder)
    Run(task, env=env).execute()
    return env


@pytest.mark.parametrize("name", ["fedkseed", "fedkseed_pro"])
def test_the_model_is_made_again_from_the_ledger_alone(name: str, tmp_path: Path) -> None:
    env = executed(tmp_path, name)
    expected = load_file(tmp_path / "model.safetensors")
    for file in (tmp_path / "checkpoints").iterdir():
        file.unlink()
    (tmp_path / "model.safetensors").unlink()
    found = rebuild(tmp_path, env)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_a_ledger_cut_at_any_byte_is_noticed(tmp_path: Path) -> None:
    executed(tmp_path)
    data = (tmp_path / LEDGER).read_bytes()
    whole = Ledger(tmp_path / LEDGER).entries()
    assert [n for n, _ in whole] == [1, 2, 3]
    ends = {0, *np.cumsum([24 + len(c) for _, c in whole]).tolist()}
    cut = tmp_path / "cut"
    for length in range(0, len(data), 7):
        cut.write_bytes(data[:length])
        if length not in ends:
            with pytest.raises(RunError, match="damaged"):
                Ledger(cut).entries()
    for place in range(0, len(data), 11):
        cut.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(RunError, match="damaged"):
            Ledger(cut).entries()
    cut.write_bytes(data[:-3])
    Ledger(cut).keep_until(9)
    assert Ledger(cut).entries() == whole[:2]
    Ledger(cut).keep_until(1)
    assert Ledger(cut).entries() == whole[:1]


def test_one_resident_model_serves_all_clients_and_is_put_back() -> None:
    fed = federation()
    progress = fed.begin()
    messages = toy.messages_of(fed, progress.arrays, 1)
    once = list(toy.contents_of(fed, messages))
    vector = fed.env.model.resident.flat.data_ptr()
    again = list(toy.contents_of(fed, toy.messages_of(fed, progress.arrays, 1)[::-1]))
    assert fed.env.model.resident.flat.data_ptr() == vector
    for a, b in zip(once, again[::-1], strict=True):
        assert packet_of(a.array_records["arrays"]) == packet_of(b.array_records["arrays"])
    owned = {p.untyped_storage().data_ptr() for p in fed.env.model.module.parameters()}
    assert owned == {fed.env.model.resident.flat.untyped_storage().data_ptr()}


def test_philox_is_the_streams_engine() -> None:
    words = arrays.philox((0, 0, 0, 0), (0, 0))
    assert [f"{int(w):08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_incremental_rebuilding_touches_only_what_changed() -> None:
    exact, quick = federation(), federation(rebuild="incremental")
    one, other = toy.run(exact), toy.run(quick)
    assert other.rounds[-1]["loss"] == pytest.approx(one.rounds[-1]["loss"], rel=1e-3)
    few = federation(rebuild="incremental", pool=2048, steps=2)
    progress = few.begin()
    few.advance(progress)
    few.advance(progress)
    with directions.count_draws() as draws:
        few.advance(progress)
    d = len(few.env.model.resident.flat)
    # Clients: one rebuild and 7 x 2 x 3 walks; server: one rebuild; clients evaluate: one more.
    assert draws.total <= (3 * 14 + 7 * 2 * 3) * d
