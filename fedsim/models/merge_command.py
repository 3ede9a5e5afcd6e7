"""What `fedsim merge-lora` does."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.core.errors import ConfigError
from fedsim.core.text import shown


def run(
    adapters: Sequence[str],
    out: str,
    method: str,
    rank: str | None,
    weights: Sequence[float] | None,
    options: Sequence[str],
    switches: Mapping[str, bool],
    as_json: bool,
) -> None:
    """Merge folders into one and print what came out.

    Args:
        adapters: folders.
        out: folder to write.
        method: see `fedsim.models.merging.METHODS`.
        rank: a number, max, sum or energy:T.
        weights: of the adapters.
        options: ``KEY=VALUE`` with values as in TOML; a bare word is a string.
        switches: options that were set by a switch of their own.
        as_json: print one JSON object.
    """
    from fedsim.models.adapters import write_adapter
    from fedsim.models.merging import merge

    chosen = {**dict(map(_parsed, options)), **switches}
    size = int(rank) if rank is not None and rank.isdecimal() else rank
    merged = merge(adapters, method, rank=size, weights=weights or None, **chosen)
    path = write_adapter(merged, out)
    ranks = sorted({f.rank for f in merged.factors.values()})
    facts: dict[str, Any] = {"path": str(path), "modules": len(merged.factors), "ranks": ranks}
    if merged.gamma is not None:
        facts |= {"gamma_mean": merged.gamma[0], "gamma_max": merged.gamma[1]}
        facts["degenerate"] = merged.degenerate
    if as_json:
        print(json.dumps(facts))
        return
    print(f"{path}  {method} of {len(adapters)} adapters, {len(merged.factors)} modules, "
          f"rank {' to '.join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))}")  # fmt: skip
    if merged.gamma is not None:
        print(f"norms restored by a factor of {merged.gamma[0]:.3g} (mean), at most "
              f"{merged.gamma[1]:.3g}")  # fmt: skip
    if merged.degenerate:
        print("every cluster holds the same rank of every adapter (they share their start): this "
              "is the mean of A and of B, scaled up where norms are restored")  # fmt: skip


def _parsed(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ConfigError(f"--option {shown(text)} must be KEY=VALUE")
    try:
        return key, tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return key, value
