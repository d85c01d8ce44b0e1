"""Ranks on simulated GPUs, one process a rank for all tests of a file; skipped where there is no g++."""

import pytest

from simulated_cuda.build import has_compiler  # isort: skip
from simulated_ranks import simulated_ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/simulated_cuda/" in item.path.as_posix():
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.skipif(not has_compiler(), reason="needs g++ to build the simulated device"))


@pytest.fixture(scope="module")
def one_gpu():
    yield from simulated_ranks(1)


@pytest.fixture(scope="module")
def two_gpus():
    yield from simulated_ranks(2)
