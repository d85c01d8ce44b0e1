"""Ranks that share sequences compute what one process computes, in every ZeRO stage."""

from typing import Any

import pytest
from sequence_runs import train_plainly, walk
from training_runs import rank_pool

COUNT = 10
STAGES = (0, 1, 2, 3)


def stage_cells(sp_size: int, **train: Any) -> list:
    return [({"sp_size": sp_size, **train}, {"zero_optimization": {"stage": stage}}, {}) for stage in STAGES]


@pytest.fixture(scope="module")
def plain():
    return train_plainly({}, COUNT)


def assert_same(found, expected, label=""):
    assert found[0] == pytest.approx(expected[0], abs=1e-4), label
    assert found[1] == pytest.approx(expected[1], rel=1e-3), label


def test_two_ranks(plain):
    for pool in rank_pool(2):
        cells = stage_cells(2)
        for curves in pool.run(walk, cells, COUNT):
            for cell, curve in zip(cells, curves, strict=True):
                assert_same(curve, plain, cell)


def test_four_ranks(plain):
    for pool in rank_pool(4):
        cells = stage_cells(4) + stage_cells(2)
        for curves in pool.run(walk, cells, COUNT):
            for cell, curve in zip(cells, curves, strict=True):
                assert_same(curve, plain, cell)
