"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and keep compiled programs in .jax_cache for the next run."""
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")  # jax's own 1.0 would leave most of ours out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# XLA's threads on a CPU. Mosaic's simulator blocks one for each warpgroup that waits, and with the two of two cores it can hang.
os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a longer sweep, left out unless -m slow asks for it")


def pytest_collection_modifyitems(config, items):
    if "slow" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="a longer sweep: run with -m slow"))
