"""FedKSeed and FedKSeed-Pro."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedsim.core import kseed, zeroth
from fedsim.core.errors import require
from fedsim.core.packed import Numbers, PackedStrategy, Parts
from fedsim.core.strategy import Setting


class FedKSeed(PackedStrategy):
    """FedKSeed: full-parameter tuning by seeds and scalars, kilobytes a round whatever the model.

    Qin et al., *Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
    Cost under 18 Kilobytes*, ICML 2024. The paper's text was not at hand: this follows its official
    code, as read for the specification. Clients take `steps` zeroth-order steps along directions
    of a pool of K seeds and send (seed, scalar gradient) pairs; the server adds them up,
    ``A[j] += sum_i c_i g``, ``c_i`` the client's share of the cohort's examples (or 1/M), and the
    model is ``w = w0 - lr sum_j A[j] z_j`` for whoever knows w0: clients that were away need
    nothing but A. With batches of one, as in the paper, examples are minibatches.

    Deviations from the official code: random directions of `fedsim.core.directions` instead of
    torch's generator, seeds without repetition from one master number, minibatches shuffled anew
    every round (the code's iterator goes on), three walks over the parameters for a step, not
    four, and A in float64 on the server and float32 on the wire.

    Args:
        pool: K, the number of seeds.
        steps: tau, local steps of a client in a round.
        lr: learning rate, constant for clients and rounds (`train.lr` and `train.lr_decay` do not
            apply).
        eps: half the distance of the two points of a slope.
        basis: ``"gaussian"`` (the paper's), ``"rademacher"``, or ``"rademacher32"``, which is much
            faster to sum.
        weighted: weigh clients by their examples; False: all alike.
        rebuild: ``"exact"`` makes the model from w0 in one pass: its bits depend on A alone, so a
            resumed run and a device that was away have the same. ``"incremental"`` adds what
            changed in A to the model before: cheaper where a round touches few of the K seeds, but
            then bits depend on when who was asked, up to rounding.
        loss_clip: clients discard steps of which the two losses differ by more; 0: none.
        max_scalar: a reply with a larger scalar gradient is refused.
        scalar_clip: the server cuts scalar gradients to this absolute value; 0: off. Then the
            model is no longer the mean of the clients' models.
        weight_decay: must be 0: seeds and scalars cannot express it.
        lr_decay: must be 1, for the same reason.

    Raises:
        ConfigError: a parameter is out of range.
    """

    client = "fedkseed"
    keeps: ClassVar[tuple[str, ...]] = ("sums",)

    def __init__(
        self,
        pool: int = 4096,
        steps: int = 200,
        lr: float = 3e-7,
        eps: float = 5e-4,
        basis: str = "gaussian",
        weighted: bool = True,
        rebuild: str = "exact",
        loss_clip: float = 0.0,
        max_scalar: float = 1e6,
        scalar_clip: float = 0.0,
        weight_decay: float = 0.0,
        lr_decay: float = 1.0,
    ) -> None:
        require(1 <= pool < 2**32, "pool", pool, "from 1 to 2^32 - 1")
        require(steps >= 1, "steps", steps, "1 or more")
        require(lr >= 0, "lr", lr, "0 or more")
        require(eps > 0, "eps", eps, "above 0")
        require(basis in zeroth.BASES, "basis", basis, " or ".join(zeroth.BASES))
        require(rebuild in ("exact", "incremental"), "rebuild", rebuild, "exact or incremental")
        require(weight_decay == 0, "weight_decay", weight_decay, "0: scalars cannot express it")
        require(lr_decay == 1, "lr_decay", lr_decay, "1: scalars are summed over all rounds")
        require(min(loss_clip, scalar_clip) >= 0, "loss_clip, scalar_clip", loss_clip, "0 or more")
        self.pool, self.steps, self.lr, self.eps, self.basis = pool, steps, lr, eps, basis
        self.weighted, self.rebuild, self.loss_clip = weighted, rebuild, loss_clip
        self.max_scalar, self.scalar_clip = max_scalar, scalar_clip
        self.incremental = rebuild == "incremental"
        self.reset()

    def reset(self) -> None:
        """A = 0."""
        self.sums = np.zeros(self.pool)

    def setup(self, setting: Setting) -> None:
        """Derive the pool from the run's seed."""
        super().setup(setting)
        self.recipe = kseed.Recipe(self.master, self.pool, self.lr, self.basis)

    def client_config(self) -> dict[str, Any]:
        """What a step needs."""
        steps = {"epochs": self.steps, "max_steps": self.steps}
        own = {n: getattr(self, n) for n in ("lr", "eps", "pool", "loss_clip")}
        return super().client_config() | steps | own | {"rebuild_mode": self.rebuild}

    def numbers(self) -> Numbers:
        """The accumulators A, float64 [K]."""
        return {"sums": self.sums}

    def hold(self, numbers: Numbers) -> None:
        """Hold these accumulators."""
        self.sums = numbers["sums"]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send the accumulators. Raises `ConfigError` for weight decay or momentum."""
        zeroth.require_plain(config)
        return super().configure_train(server_round, arrays, config, grid)

    def chances(self) -> np.ndarray | None:
        """The probabilities to send, [K]; None: all seeds alike, and nothing is sent."""
        return None

    def pack(self, server_round: int, numbers: Numbers) -> bytes:
        """The accumulators as float32, and Pro's probabilities."""
        return kseed.pack_down(server_round, numbers["sums"], self.chances())

    def limit(self) -> int:
        """A pair for each step."""
        return kseed.most_up(self.pool, self.steps)

    def check(self, data: bytes, round: int | None = None) -> tuple[int, Any, Any]:
        """Pairs of this round, within the pool."""
        return kseed.read_up(data, self.pool, self.steps, round, self.max_scalar)

    def absorb(self, parts: Parts) -> None:
        """``A[j] += sum_i c_i g`` (A6)."""
        for share, data in parts:
            _, places, scalars = self.check(data)
            if self.scalar_clip:
                scalars = scalars.clip(-self.scalar_clip, self.scalar_clip)
            np.add.at(self.sums, places, share * scalars)
            self.observe(places, scalars)

    def observe(self, places: Any, scalars: Any) -> None:
        """Look at a client's scalar gradients; places [n], scalars [n]."""


class FedKSeedPro(FedKSeed):
    """FedKSeed-Pro: seeds whose scalar gradients were large are drawn more often.

    The mean absolute scalar gradient of each seed over all clients and rounds is normalised to
    [0, 1] and goes through a softmax, so no seed is more than e times as likely as another.
    Followed as in the official code; uniform in the first round.

    Args:
        amplitude_clip: scalar gradients count up to this absolute value.
        history_start: ``"zero"`` lets every seed's history begin with a zero, as the official code
            does; ``"none"`` takes the mean of what was observed.
        options: those of `FedKSeed`.

    Raises:
        ConfigError: a parameter is out of range.
    """

    keeps = ("sums", "totals", "counts")

    def __init__(
        self, amplitude_clip: float = 1000.0, history_start: str = "zero", **options: Any
    ) -> None:
        super().__init__(**options)
        require(amplitude_clip > 0, "amplitude_clip", amplitude_clip, "above 0")
        require(history_start in ("zero", "none"), "history_start", history_start, "zero or none")
        self.amplitude_clip, self.history_start = amplitude_clip, history_start

    def reset(self) -> None:
        """No history yet."""
        super().reset()
        self.totals, self.counts = np.zeros(self.pool), np.zeros(self.pool)

    def chances(self) -> np.ndarray:
        """Softmax of the normalised amplitudes."""
        start = self.history_start == "zero"
        return kseed.probabilities(kseed.amplitudes(self.totals, self.counts, start))

    def observe(self, places: Any, scalars: Any) -> None:
        """Add to the histories."""
        np.add.at(self.totals, places, np.minimum(np.abs(scalars), self.amplitude_clip))
        np.add.at(self.counts, places, 1.0)
