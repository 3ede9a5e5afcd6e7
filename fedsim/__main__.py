"""``python -m fedsim`` is the `fedsim` command."""

from __future__ import annotations

from fedsim.cli import main

main()
