"""Judges models on the central test set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from flwr.app import ArrayRecord

from fedsim.core.generation import judge
from fedsim.core.model import FlatModel
from fedsim.core.nodes import client_at
from fedsim.core.parts import shapes_of
from fedsim.core.records import FlatRecord, as_flat
from fedsim.core.strategy import Served
from fedsim.data.tokens import read_answers
from fedsim.runtime.work import Environment


class Central:
    """The server's own evaluation.

    Args:
        env: data and model on the server's side.
    """

    def __init__(self, env: Environment) -> None:
        self.env = env

    def judge(self, models: Mapping[str, Served]) -> dict[str, float]:
        """Mean over models of their metrics on the central test set, weighted by their clients."""
        index = torch.from_numpy(np.asarray(self.env.data.central_test))
        models = {n: m for n, m in models.items() if self._whole(m.arrays)}
        if not len(index) or not models:
            return {}
        sums, total = torch.zeros(3, dtype=torch.float64), 0.0
        for served in models.values():
            weight = float(1 if served.clients is None else len(served.clients))
            sums += self._measure(served.arrays, index) * weight
            total += weight
        loss, right, count = (sums / total).tolist()
        return self.named(loss / count, right / count)

    def answer(self, models: Mapping[str, Served], count: int, tokens: int) -> dict[str, float]:
        """Rouge-L and exact matches of greedy answers to the central test set's instructions.

        Mean over models, weighted by their clients.

        Args:
            models: that can be judged whole.
            count: instructions that are answered, spread evenly over the test set.
            tokens: of an answer at most.

        Raises:
            DataError: the data has no instructions.
        """
        central, env = np.asarray(self.env.data.central_test), self.env
        models = {n: m for n, m in models.items() if self._whole(m.arrays)}
        count = min(count, len(central))
        if not count or not models:
            return {}
        decode, end = read_answers(env.data.meta)
        rows = torch.from_numpy(central[np.arange(count) * len(central) // count])
        x, y = env.data.fields["x"][rows], env.data.fields["y"][rows]
        sums, total = dict[str, float](), 0.0
        for served in models.values():
            record = as_flat(served.arrays, env.model.layout)
            outputs = partial(env.model.outputs, record.flat, record.beside)
            found = judge(outputs, x, y, decode, end, tokens, min(16, env.batch_size))
            weight = float(1 if served.clients is None else len(served.clients))
            sums = {n: sums.get(n, 0.0) + weight * value for n, value in found.items()}
            total += weight
        return {n: value / total for n, value in sums.items()}

    def _whole(self, arrays: ArrayRecord) -> bool:
        """Whether a model has every entry: one without its personal layers cannot be judged."""
        return self._model(arrays) is not None

    def _model(self, arrays: ArrayRecord) -> FlatModel | None:
        """The architecture that these are the values of."""
        if isinstance(arrays, FlatRecord) and arrays.layout is self.env.model.layout:
            return self.env.model
        others = len(self.env.architectures) > 1
        shapes = shapes_of(arrays) if others else {}
        for model in self.env.architectures:
            layout = model.layout
            if set(layout.names) <= set(arrays) and (
                not others
                or all(shapes[n] == s for n, s in zip(layout.names, layout.shapes, strict=True))
            ):
                return model
        return None

    def _measure(self, arrays: ArrayRecord, index: torch.Tensor) -> torch.Tensor:
        """Sums over these examples of loss, right predictions and positions; float64 [3]."""
        env, model = self.env, self._model(arrays) or self.env.model
        record = as_flat(arrays, model.layout)
        return model.measure(record, env.data.fields, index, env.batch_size).double().sum(1)

    def loss_of(self, arrays: ArrayRecord, node: int | None = None) -> float:
        """Mean loss on the central test set, or on the node's data (see `Setting.evaluate`)."""
        data, rows = self.env.data, np.asarray(self.env.data.central_test)
        if node is not None:
            own = data.test[client_at(node)]
            rows = own if len(own) else data.train[client_at(node)]
        loss, _, count = self._measure(arrays, torch.from_numpy(rows)).tolist()
        return loss / max(count, 1.0)

    def named(self, loss: float, accuracy: float) -> dict[str, float]:
        """Mean loss and accuracy by the names that the task gives them."""
        kind = self.env.data.criterion
        row = {"loss": loss}
        if kind != "mse":
            row["accuracy"] = accuracy
        if kind == "next_token":
            row["perplexity"] = math.exp(min(loss, 700.0))
        return row
