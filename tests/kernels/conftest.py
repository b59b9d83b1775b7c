"""Kernels run here on the CPU: Mosaic's in GPU-interpret mode, Triton's in the plain one."""
import pytest

from pallas_kernels import compat


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a longer sweep, left out unless -m slow asks for it")


def pytest_collection_modifyitems(config, items):
    if "slow" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="a longer sweep: run with -m slow"))


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
