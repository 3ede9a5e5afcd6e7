"""Errors a user can mend. The command line prints them as one line and exits with their code."""

from __future__ import annotations


class FedsimError(Exception):
    """Base of every error that is the user's to mend; `exit_code` is the process's exit status."""

    exit_code = 1


class ConfigError(FedsimError):
    """An experiment file or an argument is wrong; the message lists every fault found."""

    exit_code = 2


class DataError(FedsimError):
    """A dataset or partition cannot be had: missing package, missing file, impossible split."""

    exit_code = 3


class RunError(FedsimError):
    """A run cannot go on: unwritable folder, damaged checkpoint, no quorum left."""

    exit_code = 4
