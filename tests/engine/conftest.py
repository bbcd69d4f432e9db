"""The engine is an extra: without llvmlite its tests are skipped."""

import importlib.util

import pytest

if importlib.util.find_spec("llvmlite") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _no_measured_tiles(tmp_path, monkeypatch):
    """Tiles that were measured on this machine do not decide what is tested."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
