"""Whole documents in windows: best-fit-decreasing bin packing (arXiv 2404.10830), a pure function of their lengths."""

import numpy as np

GROUP = 1 << 17
"""Documents packed together: neighbours in the corpus, so that a window reads from a bounded part of it."""


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill windows of `capacity` with documents, each going where the least room is left; longer ones count as full.

    Args:
        lengths: (num_documents,) int, at least 1.

    Returns:
        order: (num_documents,) int64, the documents window by window.
        bounds: (num_windows + 1,) int64: window w holds documents order[bounds[w]:bounds[w + 1]].
    """
    lengths = np.minimum(lengths, capacity)
    windows = np.empty(len(lengths), dtype=np.int64)  # of each document
    num_windows = 0
    for first in range(0, len(lengths), GROUP):
        group = slice(first, first + GROUP)
        windows[group] = num_windows + _pack_group(lengths[group], capacity)
        num_windows = int(windows[group].max()) + 1
    order = np.argsort(windows, kind="stable")
    return order, np.append(0, np.cumsum(np.bincount(windows, minlength=num_windows)))


def _pack_group(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The window of each document."""
    windows = np.empty(len(lengths), dtype=np.int64)
    open_windows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left
    rooms = 0  # bit r is set when a window with room r is open: the lowest bit from `length` up is the best fit
    num_windows = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            window = open_windows[room].pop()
            if not open_windows[room]:
                rooms ^= 1 << room
        else:
            room, window = capacity, num_windows
            num_windows += 1
        windows[document] = window
        if left := room - length:
            open_windows[left].append(window)
            rooms |= 1 << left
    return windows
