"""Any Flower strategy, made fit for the round loop."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim.core.averaging import Mean, examples_of, metrics_of
from fedsim.core.records import Layout, as_flat, from_record
from fedsim.core.strategy import Aggregate, Exchange, Setting, Strategy


class _Copies(ArrayRecord):
    """What a foreign strategy is shown; it may change it."""

    def to_numpy_ndarrays(self, *, keep_input: bool = True) -> list[Any]:
        """The arrays. To drop its input, Flower collects garbage: 0.1 s for each client."""
        return super().to_numpy_ndarrays()


_MINIMA = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")


class Adapted(Strategy):
    """A Flower strategy behind the interface of `Strategy`.

    Flower's strategies treat every array as a float to be averaged or optimised. Here they see
    the trainable parameters only; buffers (BatchNorm statistics and counters) are averaged or,
    if integer, take the maximum over clients. Results are cast back to the model's dtypes. Their
    own sampling is switched off: the runner's grid shows them the cohort. Their log is kept to
    warnings.

    Args:
        inner: the Flower strategy.
        client: name of the client half.
    """

    def __init__(self, inner: FlowerStrategy, client: str) -> None:
        self.inner = inner
        self.client = client  # type: ignore[misc]
        everybody = {"fraction_train": 1.0, "fraction_evaluate": 1.0}
        for name, value in {**everybody, **dict.fromkeys(_MINIMA, 1)}.items():
            if hasattr(inner, name):
                setattr(inner, name, value)
        self._layout: Layout | None = None

    def setup(self, setting: Setting) -> None:
        """Learn which entries are parameters."""
        super().setup(setting)
        self._layout = setting.info.layout

    def _parameters(self, record: ArrayRecord) -> ArrayRecord:
        """Copies of the trainable entries, in the order of the wire."""
        names = frozenset(self._of(record).trainable)
        return _Copies({n: Array(a.numpy()) for n, a in record.items() if n in names})

    def _of(self, record: ArrayRecord) -> Layout:
        if self._layout is None:
            self._layout = as_flat(record).layout
        return self._layout

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """What the inner strategy sends, with the whole model and this package's route."""
        if not list(grid.get_node_ids()):
            return []  # Flower's strategies would wait for a node for ever
        with _quiet():
            inner = self.inner.configure_train(
                server_round, self._parameters(arrays), ConfigRecord(dict(config)), grid
            )
        content = {"arrays": arrays}
        told = {
            message.metadata.dst_node_id: dict(
                next(iter(message.content.config_records.values()), ConfigRecord())
            )
            for message in sorted(inner, key=lambda m: m.metadata.dst_node_id)
        }
        same = next(iter(told.values()), {})
        if all(config == same for config in told.values()):
            return self.broadcast("train", content, same, list(told))
        return [self.message("train", content, config, node) for node, config in told.items()]

    def exchange(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Exchange:
        """A round; if it fails, the inner strategy is put back to where it was before."""
        before = self.state_dict()
        try:
            return (yield from super().exchange(server_round, arrays, config, grid))
        except Exception:
            self.load_state_dict(before)
            raise

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """What the inner strategy makes of the parameters; buffers are averaged beside it."""
        buffers, shown, metrics = Mean(), list[Message](), list[MetricRecord]()
        for reply in replies:
            record = reply.content.array_records["arrays"]
            buffers.add(as_flat(record, self._of(record)), examples_of(reply.content))
            metrics.append(metrics_of(reply.content))
            reply.content = RecordDict({"arrays": self._parameters(record)})
            shown.append(reply)
        # Flower ends the run if one client reports a metric that another does not.
        common = [
            name
            for name in (metrics[0] if metrics else ())
            if all(isinstance(m.get(name), (int, float)) for m in metrics)
        ]
        for reply, own in zip(shown, metrics, strict=True):
            reply.content["metrics"] = MetricRecord({n: own[n] for n in common})
        with _quiet():
            arrays, aggregated = self.inner.aggregate_train(server_round, shown)
        mean = buffers.record()
        if arrays is None or mean is None:
            return None, aggregated
        return mean.with_flat(mean.layout.flatten(mean.state() | from_record(arrays))), aggregated

    def state_dict(self) -> dict[str, Any]:
        """The inner strategy's own, or its attributes that are numbers or hold arrays."""
        own = getattr(self.inner, "state_dict", None)
        if own is not None:
            return cast("dict[str, Any]", own())
        packed = {name: _pack(value) for name, value in sorted(vars(self.inner).items())}
        return {name: value for name, value in packed.items() if value is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back."""
        own = getattr(self.inner, "load_state_dict", None)
        if own is not None:
            own(state)
            return
        for name, value in state.items():
            setattr(self.inner, name, _unpack(value))


_RECORD = "$record"


def _pack(value: Any) -> Any:
    """A value with its arrays as tensors; None if it is neither a number nor made of arrays."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, ArrayRecord):
        return {_RECORD: from_record(value)}
    if isinstance(value, (dict, list)) and value:
        items = dict(value.items() if isinstance(value, dict) else enumerate(value))
        if all(isinstance(v, np.ndarray) for v in items.values()):
            packed = {k: _pack(v) for k, v in items.items()}
            return packed if isinstance(value, dict) else list(packed.values())
    return None


def _unpack(value: Any) -> Any:
    """The inverse of `_pack`."""
    if isinstance(value, dict) and set(value) == {_RECORD}:
        return ArrayRecord({k: Array(v.numpy()) for k, v in value[_RECORD].items()})
    if isinstance(value, dict):
        return {k: _unpack(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unpack(v) for v in value]
    return value.numpy() if isinstance(value, torch.Tensor) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower's log to warnings: its strategies report every call."""
    log = logging.getLogger("flwr")
    before = log.level
    log.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(before)


def adapt(strategy: FlowerStrategy, client: str) -> Strategy:
    """`strategy` itself if it is one of ours, else wrapped.

    Args:
        strategy: any Flower strategy.
        client: name of the client half to use with a foreign strategy.
    """
    return strategy if isinstance(strategy, Strategy) else Adapted(strategy, client)
