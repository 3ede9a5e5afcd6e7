"""The catalogues agree with the functions, and with what the registry says of them."""

from __future__ import annotations

import inspect

import pytest

from fedsim import registry
from fedsim.data.catalogue import DATASETS, PARTITIONERS
from fedsim.models.catalogue import MODELS

KINDS = {"datasets": DATASETS, "partitioners": PARTITIONERS, "models": MODELS}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in KINDS.items() for n in names])
def test_component(kind, name):
    component = registry.resolve(kind, name)
    assert registry.describe(kind, name)
    required = {
        n for n, p in inspect.signature(component).parameters.items() if p.default is p.empty
    }
    needs = required - registry.GIVEN[kind]
    assert registry.plain(kind, name) == (not needs)
