"""Which client has which rank."""

from __future__ import annotations

from collections.abc import Mapping

from fedsim.core.errors import ConfigError, require
from fedsim.core.nodes import client_at
from fedsim.core.strategy import Setting


class Ranks:
    """Ranks of clients, from the configuration or by what devices they are.

    Args:
        given: a list, dealt in turn; a table from names of device profiles to ranks; None.

    Raises:
        ConfigError: a rank is below 1.
    """

    def __init__(self, given: list[int] | Mapping[str, int] | None) -> None:
        values = list(given.values()) if isinstance(given, Mapping) else given
        whole = all(type(v) is int for v in values or [])
        sound = values is None or (bool(values) and whole and min(values) >= 1)
        require(sound, "ranks", given, "whole numbers, 1 or above")
        self.given = given
        self._own: list[int] | None = None

    def check(self, most: int, setting: Setting) -> None:
        """Find out every client's rank.

        Args:
            most: the model's rank.
            setting: knows the clients' devices.

        Raises:
            ConfigError: a rank is above the model's, or a device has none.
        """
        if self.given is None:
            return
        if isinstance(self.given, Mapping):
            unknown = sorted(set(setting.devices) - set(self.given))
            if unknown or not setting.devices:
                raise ConfigError(
                    f"ranks = {dict(self.given)} must name the device profiles of [clock]"
                    + (f"; {', '.join(unknown)} is missing" if unknown else "")
                )
            self._own = [self.given[name] for name in setting.devices]
        else:
            count = max(setting.num_clients, 1)
            self._own = [self.given[c % len(self.given)] for c in range(count)]
        values = self.given.values() if isinstance(self.given, Mapping) else self.given
        require(max(values) <= most, "ranks", max(values), f"at most the model's rank {most}")

    def of(self, node: int, default: int) -> int:
        """A node's rank; the default where none was given."""
        return default if self._own is None else self._own[client_at(node)]
