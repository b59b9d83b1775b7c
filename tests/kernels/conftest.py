"""Kernels run here on the CPU: Mosaic's in GPU-interpret mode, Triton's in the plain one."""
import pytest

from pallas_kernels import compat


@pytest.fixture
def interpreted():
    """Mosaic kernels called inside the test are simulated."""
    with compat.interpreting():
        yield


@pytest.fixture
def interpreted_triton():
    """Triton kernels called inside the test are interpreted."""
    with compat.interpreting_triton():
        yield
