"""Errors a user can mend. The command line prints them as one line and exits with their code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args


class FedsimError(Exception):
    """Base of every error that is the user's to mend; `exit_code` is the process's exit status."""

    exit_code = 1


@dataclass(frozen=True)
class Fault:
    """One thing wrong with an experiment.

    Attributes:
        source: where it was written: a file, with the override where one did it.
        key: dotted key, strategies by label; or the line and column of a syntax error.
        problem: what is allowed there, and the nearest correct spelling where there is one.
        value: the value given, as shown to the user; empty when none was.
    """

    source: str
    key: str
    problem: str
    value: str = ""

    def __str__(self) -> str:
        given = f" = {self.value}" if self.value else ""
        return f"{self.source}: {self.key}{given}: {self.problem}"


class ConfigError(FedsimError):
    """An experiment file or an argument is wrong; the message lists every fault found.

    Attributes:
        faults: the single faults, where they are known apart.
    """

    exit_code = 2

    def __init__(self, message: str = "", faults: Iterable[Fault] = ()) -> None:
        self.faults = tuple(faults)
        super().__init__(message or "\n".join(map(str, self.faults)))


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Check an argument.

    Raises:
        ConfigError: "`name` = `value` must be `allowed`", unless it `holds`.
    """
    if not holds:
        raise ConfigError(f"{name} = {value} must be {allowed}")


def one_of(name: str, value: object, literal: Any) -> None:
    """Check that an argument is one of the values of a `Literal`.

    Raises:
        ConfigError: it is none of them.
    """
    allowed = get_args(literal)
    require(value in allowed, name, value, f"one of {', '.join(allowed)}")


class DataError(FedsimError):
    """A dataset or partition cannot be had: missing package, missing file, impossible split."""

    exit_code = 3


class RunError(FedsimError):
    """A run cannot go on: unwritable folder, damaged checkpoint, no quorum left."""

    exit_code = 4
