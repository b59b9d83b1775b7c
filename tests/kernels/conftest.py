"""Mosaic kernels run here in GPU-interpret mode, on the CPU."""
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import compat


class _Numpy:
    """numpy for the simulator, with a matmul of one order: a BLAS gives a row other bits at another place in the tile."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def matmul(a, b, dtype):
        """Products added in ascending k, each rounded to `dtype`."""
        a, b = a.astype(dtype), b.astype(dtype)
        out = np.zeros((a.shape[0], b.shape[1]), dtype)
        with np.errstate(all="ignore"):
            for k in range(a.shape[1]):
                out += a[:, k:k + 1] * b[k]
        return out


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a longer sweep, left out unless -m slow asks for it")


def pytest_collection_modifyitems(config, items):
    if "slow" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="a longer sweep: run with -m slow"))


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels called inside the test are simulated."""
    monkeypatch.setattr(gpu_callbacks, "np", _Numpy())
    with compat.interpreting():
        yield
