"""What travels to devices is copied before a deployment starts, and nothing else is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from fedsim.deploy.loopback import staged
from tests.deploy.support import ROOT


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pathspec")
def test_the_copy_is_the_app(tmp_path: Path) -> None:
    """Flower makes the same bundle of it, to the byte, and nothing of an earlier copy is left."""
    (tmp_path / "app" / "fedsim").mkdir(parents=True)
    (tmp_path / "app" / "fedsim" / "gone.py").touch()
    copied = staged(tmp_path / "app")
    assert build_fab_from_disk(copied) == build_fab_from_disk(ROOT)
    assert len([*copied.rglob("*.py")]) > 100
