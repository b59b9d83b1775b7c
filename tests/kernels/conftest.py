"""Mosaic kernels run here in GPU-interpret mode, on the CPU."""
import pytest

from pallas_kernels import compat


@pytest.fixture
def interpreted():
    """Kernels called inside the test are simulated."""
    with compat.interpreting():
        yield
