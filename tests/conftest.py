"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and keep compiled programs in .jax_cache for the next run."""
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")  # jax's own 1.0 would leave most of ours out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# XLA's threads on a CPU are those that a user has. Mosaic's simulator blocks one for each warpgroup that waits, and can hang with few.
ENOUGH_FOR_THE_SIMULATOR = 16


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a longer sweep, left out unless -m slow asks for it")
    config.addinivalue_line("markers", "simulator: runs Mosaic's simulator, which needs NPROC=16 in the environment; make test gives it")
    from jaxllm import machine
    machine.DEFAULT_FOLDER = os.environ["JAX_COMPILATION_CACHE_DIR"]  # what is found about this machine stays out of the user's cache


def pytest_collection_modifyitems(config, items):
    few = int(os.environ.get("NPROC") or os.cpu_count() or 1) < ENOUGH_FOR_THE_SIMULATOR
    for item in items:
        if "interpreted" in item.fixturenames:
            item.add_marker(pytest.mark.simulator)
            if few:
                item.add_marker(pytest.mark.skip(reason=f"Mosaic's simulator can hang with few threads: NPROC={ENOUGH_FOR_THE_SIMULATOR} -m simulator"))
        if item.get_closest_marker("slow") and "slow" not in (config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="a longer sweep: run with -m slow"))
