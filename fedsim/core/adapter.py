"""Any Flower strategy, made fit for the round loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim.core.averaging import Mean, examples_of, metrics_of
from fedsim.core.records import FlatRecord, Layout, as_flat, from_record
from fedsim.core.strategy import Aggregate, Setting, Strategy, route


class Adapted(Strategy):
    """A Flower strategy behind the interface of `Strategy`.

    Flower's strategies treat every array as a float to be averaged or optimised. Here they see
    the trainable parameters only; buffers (BatchNorm statistics and counters) are averaged or,
    if integer, take the maximum over clients. Their own sampling is switched off: the runner's
    grid shows them the cohort.

    Args:
        inner: the Flower strategy.
        client: name of the client half.
    """

    def __init__(self, inner: FlowerStrategy, client: str) -> None:
        self.inner = inner
        self.client = client  # type: ignore[misc]
        for name in ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"):
            if hasattr(inner, name):
                setattr(inner, name, 1)
        self._layout: Layout | None = None

    def setup(self, setting: Setting) -> None:
        """Learn which entries are parameters."""
        super().setup(setting)
        self._layout = setting.info.layout

    def _parameters(self, record: ArrayRecord) -> ArrayRecord:
        layout = self._of(record)
        state = from_record(record)
        arrays = {n: Array(state[n].numpy()) for n in layout.names if n in set(layout.trainable)}
        return ArrayRecord(arrays)

    def _of(self, record: ArrayRecord) -> Layout:
        if self._layout is None:
            self._layout = as_flat(record).layout
        return self._layout

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """What the inner strategy sends, with the whole model and this package's route."""
        inner = self.inner.configure_train(
            server_round, self._parameters(arrays), ConfigRecord(dict(config)), grid
        )
        messages = []
        for message in inner:
            told = next(iter(message.content.config_records.values()), ConfigRecord())
            content = RecordDict({"arrays": arrays, "config": told})
            messages.append(
                Message(
                    content,
                    dst_node_id=message.metadata.dst_node_id,
                    message_type=f"train.{route(self.client)}",
                )
            )
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """What the inner strategy makes of the parameters; buffers are averaged beside it."""
        buffers, shown, whole = Mean(), [], cast("FlatRecord | None", None)
        for reply in replies:
            record = reply.content.array_records["arrays"]
            whole = as_flat(record, self._of(record))
            buffers.add(whole, examples_of(reply.content))
            content = RecordDict(
                {"arrays": self._parameters(whole), "metrics": metrics_of(reply.content)}
            )
            reply.content = content
            shown.append(reply)
        arrays, metrics = self.inner.aggregate_train(server_round, shown)
        mean = buffers.record()
        if arrays is None or mean is None:
            return None, metrics
        state = mean.state() | from_record(arrays)
        flat = mean.layout.flatten(state)
        return mean.with_flat(flat), metrics

    def state_dict(self) -> dict[str, Any]:
        """The inner strategy's own, or its attributes that hold arrays."""
        own = getattr(self.inner, "state_dict", None)
        if own is not None:
            return cast("dict[str, Any]", own())
        return {k: _pack(v) for k, v in sorted(vars(self.inner).items()) if _holds_arrays(v)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the arrays back."""
        own = getattr(self.inner, "load_state_dict", None)
        if own is not None:
            own(state)
            return
        for name, value in state.items():
            setattr(self.inner, name, _unpack(value))


def _holds_arrays(value: object) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(v, np.ndarray) for v in value.values())
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, np.ndarray) for v in value)
    return isinstance(value, np.ndarray)


def _pack(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _pack(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_pack(v) for v in value]
    return torch.from_numpy(np.ascontiguousarray(value))


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _unpack(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unpack(v) for v in value]
    return value.numpy()


def adapt(strategy: FlowerStrategy, client: str) -> Strategy:
    """`strategy` itself if it is one of ours, else wrapped.

    Args:
        strategy: any Flower strategy.
        client: name of the client half to use with a foreign strategy.
    """
    return strategy if isinstance(strategy, Strategy) else Adapted(strategy, client)
