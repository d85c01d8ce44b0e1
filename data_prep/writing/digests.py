"""A set of 16-byte digests in 16 bytes each: exact de-duplication of more documents than fit a Python set."""

import numpy as np

DIGEST_BYTES = 16
_DTYPE = np.dtype(f"S{DIGEST_BYTES}")


class DigestSet:
    """Sorted runs of falling length, merged as they grow: 16 bytes a digest, and as much again while two runs merge."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, digests: bytes) -> np.ndarray:
        """Add digests laid end to end, (n * 16) bytes; returns (n,) bool: which were new, a repeat inside counting as
        old."""
        values = np.frombuffer(digests, dtype=_DTYPE)
        unique, first = np.unique(values, return_index=True)
        known = np.zeros(len(unique), dtype=bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            known |= run[at] == unique
        is_new = np.zeros(len(values), dtype=bool)
        is_new[first[~known]] = True
        if not known.all():
            self._runs.append(unique[~known])
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate((self._runs.pop(), self._runs.pop()))
            merged.sort(kind="stable")  # takes advantage of the sorted halves
            self._runs.append(merged)
        return is_new
