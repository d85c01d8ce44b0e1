"""Best-fit packing of whole documents."""

import itertools

import numpy as np
import pytest

from minimind.data import packing
from minimind.data.packing import pack


def draw_lengths(count: int) -> np.ndarray:
    return np.random.default_rng(0).lognormal(4, 0.8, count).astype(np.int64) + 1


@pytest.mark.parametrize("group", [1 << 17, 100])
def test_every_document_once_and_no_window_too_full(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(packing, "GROUP", group)
    lengths = draw_lengths(5_000)
    order, bounds = pack(lengths, 300)
    assert sorted(order.tolist()) == list(range(5_000))
    filled = np.add.reduceat(np.minimum(lengths, 300)[order], bounds[:-1])
    assert bounds[0] == 0 and bounds[-1] == 5_000 and filled.min() > 0 and filled.max() <= 300


def test_windows_are_almost_full() -> None:
    lengths = draw_lengths(20_000)
    _, bounds = pack(lengths, 512)
    assert np.minimum(lengths, 512).sum() / (512 * (len(bounds) - 1)) > 0.995


def test_the_best_fit_is_taken() -> None:
    # 7 and 5 open windows with rooms 3 and 5; 3 fits both, and goes where it leaves the least.
    order, bounds = pack(np.array([3, 7, 5]), 10)
    assert [order[low:high].tolist() for low, high in itertools.pairwise(bounds)] == [[0, 1], [2]]


def test_long_documents_fill_a_window_each_and_none_is_no_window() -> None:
    order, bounds = pack(np.array([99, 10, 11]), 10)
    assert order.tolist() == [0, 1, 2] and bounds.tolist() == [0, 1, 2, 3]
    order, bounds = pack(np.array([], dtype=np.int64), 10)
    assert order.size == 0 and bounds.tolist() == [0]
