"""Small models of images, numbers and text."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.models.building import build

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    # Imported when first used: the catalogue of names must not cost an import of torch.
    if name != "build":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.building").build
