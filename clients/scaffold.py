"""Client half of SCAFFOLD."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.core.program import LocalProgram, LocalState


@dataclass(frozen=True, kw_only=True)
class Scaffold(LocalProgram):
    """Local SGD along ``g_i(y) - c_i + c`` (Karimireddy et al. 2020, Algorithm 1, option II).

    After K steps from x to y: ``c_i^+ = c_i - c + (x - y) / (K lr)``. The formula is exact for
    plain SGD; with momentum it is an approximation. A client without steps keeps its variate.
    """

    keeps = ("control",)

    def init(self, s: LocalState) -> None:
        """The server's control variate minus the client's own, the same in every step."""
        s.shift = s.received["control"] - s.kept["control"]  # type: ignore[attr-defined]

    def correction(self, s: LocalState) -> Tensor | None:
        """What the variates say."""
        return s.shift  # type: ignore[attr-defined]

    def final(self, s: LocalState) -> None:
        """Renew the control variate; send its change, keep the new one."""
        change = (s.start - s.w) / (s.num_steps * self.lr) - s.received["control"]
        s.sent["control"] = change
        s.kept["control"] = s.kept["control"] + change
