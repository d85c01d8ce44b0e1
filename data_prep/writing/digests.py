"""A set of 16-byte digests in 16 bytes each: exact de-duplication of more documents than fit a Python set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minimind.files import replace_file

DIGEST_BYTES = 16
_DTYPE = np.dtype(f"S{DIGEST_BYTES}")


def digests_name(part: int) -> str:
    """The file with the digests of the documents of one part of a corpus, where repeats were left out."""
    return f"digests_{part:05d}.bin"


class DigestSet:
    """Sorted runs of falling length, merged as they grow: 16 bytes a digest, and as much again while two runs merge."""

    def __init__(self, known: Sequence[Path] = ()) -> None:
        """`known`: files of digests that `save` wrote, which count as added; they are mapped, not held."""
        self._runs: list[np.ndarray] = []
        self._known = [np.memmap(path, dtype=_DTYPE, mode="r") for path in known if path.stat().st_size]

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def save(self, path: Path, without: Sequence[bytes] = ()) -> None:
        """Write the digests that were added, but for those of `without`: sorted, 16 bytes each."""
        merged = np.concatenate([np.empty(0, _DTYPE), *self._runs])
        merged = merged[~np.isin(merged, np.array(without, dtype=_DTYPE))]
        merged.sort(kind="stable")
        replace_file(path, merged.tobytes())

    def add(self, digests: bytes) -> np.ndarray:
        """Add digests laid end to end, (n * 16) bytes; returns (n,) bool: which were new, a repeat inside counting as
        old."""
        values = np.frombuffer(digests, dtype=_DTYPE)
        unique, first = np.unique(values, return_index=True)
        known = np.zeros(len(unique), dtype=bool)
        for run in (*self._known, *self._runs):
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
