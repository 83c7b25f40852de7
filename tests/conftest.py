"""A hostile environment for every test: strict dtype promotion, eight devices; warnings are errors (pyproject)."""

import gc
import os
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The compiler for TPUs is installed, and without this JAX would look for a TPU first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


MAPS = 40_000
"""Of the 65,530 pieces of memory that Linux lets a process map. Each compiled program takes some, and without room for
one more the process dies, so that a worker that has run thousands of tests has to let go of the older ones."""


def pytest_runtest_teardown():
    if sys.platform != "linux":
        return
    with open("/proc/self/maps") as maps:
        full = sum(1 for _ in maps) > MAPS
    if full:
        jax.clear_caches()
        gc.collect()
