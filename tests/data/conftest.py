"""A cache folder of the tests' own."""

from __future__ import annotations

import pytest

from fedsim.data import loading


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FEDSIM_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def nothing_loaded():
    loading._loaded.clear()
