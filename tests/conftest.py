"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and keep compiled programs in .jax_cache for the next run."""
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")  # jax's own 1.0 would leave most of ours out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
