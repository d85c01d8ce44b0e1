"""Ranks on simulated GPUs, one process a rank for all tests of a file; skipped where there is no g++.

With `-m gpu`, on a machine that has GPUs, the ranks are on those: what is marked so holds there as well.
"""

import pytest
import torch
from simulated_device.build import has_compiler
from simulated_ranks import simulated_ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/simulated_cuda/" in item.path.as_posix():
            item.add_marker(pytest.mark.slow)
            lacks = not torch.cuda.is_available() and not has_compiler()
            item.add_marker(pytest.mark.skipif(lacks, reason="needs g++ to build the simulated device"))


@pytest.fixture(scope="module")
def one_gpu():
    yield from simulated_ranks(1)


@pytest.fixture(scope="module")
def two_gpus():
    if torch.cuda.device_count() == 1:
        pytest.skip("needs two GPUs")
    yield from simulated_ranks(2)
