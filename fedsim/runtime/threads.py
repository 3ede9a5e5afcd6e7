"""Clients on threads: one resident model for each, and results in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import local
from typing import TypeVar

import torch

from fedsim.core.model import FlatModel
from fedsim.data import FederatedData
from fedsim.runtime.cohort import Outcomes, Work
from fedsim.runtime.plan import Plan, plans
from fedsim.runtime.serial import attempt

T = TypeVar("T")
AHEAD = 4
"""Tasks for each worker that may be done or under way before the first of them is taken."""


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside the block: bits must not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """Threads that do tasks, longest first, and hand over results in the order of the tasks.

    Each thread computes with one torch thread. With one worker the tasks are done by the caller,
    each when its result is asked for.

    Args:
        count: number of workers, at least 1.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None

    def map(
        self, do: Callable[[int], T], tasks: int, cost: Sequence[float] | None = None
    ) -> Iterator[T]:
        """Yield ``do(0)``, ``do(1)``, ... of so many tasks.

        Args:
            do: one task.
            tasks: how many there are.
            cost: how long each takes, in any unit; longer ones start earlier.
        """
        if self.count == 1 or tasks == 1:
            for task in range(tasks):
                with one_thread():
                    result = do(task)
                yield result
            return
        self._pool = self._pool or ThreadPoolExecutor(
            self.count, "fedsim", initializer=torch.set_num_threads, initargs=(1,)
        )
        ahead = min(tasks, AHEAD * self.count)
        first = sorted(range(ahead), key=lambda i: -cost[i]) if cost is not None else range(ahead)
        waiting: dict[int, Future[T]] = {i: self._pool.submit(do, i) for i in first}
        try:
            for task in range(tasks):
                result = waiting.pop(task).result()
                if task + ahead < tasks:
                    waiting[task + ahead] = self._pool.submit(do, task + ahead)
                yield result
                del result
        finally:
            for future in waiting.values():
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class Threads:
    """Executes clients on threads, each worker on a resident copy of the module.

    Args:
        model: the model.
        data: all examples, and who owns which.
        workers: the threads.
        channels_last: train on images in channels-last format.
    """

    name = "threads"

    def __init__(
        self, model: FlatModel, data: FederatedData, workers: Workers, channels_last: bool = False
    ) -> None:
        self.model, self.data, self.workers = model, data, workers
        self._channels_last, self._own = channels_last, local()

    def resident(self) -> FlatModel:
        """The model of the calling thread."""
        if not hasattr(self._own, "model"):
            self._own.model = self.model.replica(self._channels_last)
        model: FlatModel = self._own.model
        return model

    def map(self, work: Work, then: Callable[[Outcomes], T], keep: bool = True) -> Iterator[T]:
        """Yield `then` of each client's outcome, in the order of the clients."""
        for part, plan in plans(work, self.data):

            def do(place: int, part: Work = part, plan: Plan = plan) -> T:
                return then(attempt(part, place, plan, self.resident(), self.data))

            yield from self.workers.map(do, len(part), plan.steps.tolist())
