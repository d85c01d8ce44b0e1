"""What a teacher finds most likely at each position of each window, stored once and read by window.

A folder holds equally many windows in each part, one part a rank: `00001_of_00002.ids.npy` (uint32) and
`00001_of_00002.log_probs.npy` (float32), each (windows * T * k,), the most likely token first. It is complete when all
parts are there.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from minimind.data.array_file import ArrayFile, map_array_file
from minimind.files import disk_errors

_TYPES = {"ids": "uint32", "log_probs": "float32"}


class SoftLabels:
    """The k most likely tokens of each position, of `num_windows` windows of T tokens."""

    def __init__(self, folder: Path, num_windows: int, seq_len: int, top_k: int) -> None:
        num_parts = int(next(folder.glob("00000_of_*.ids.npy")).name.split("_of_")[1][:5])
        self._windows_a_part = -(-num_windows // num_parts)
        self._shape = (self._windows_a_part, seq_len, top_k)
        self._parts = [
            [self._map(folder / f"{part:05d}_of_{num_parts:05d}.{name}.npy", name) for name in _TYPES]
            for part in range(num_parts)
        ]

    def _map(self, path: Path, name: str) -> np.ndarray:
        return map_array_file(path, _TYPES[name], int(np.prod(self._shape))).reshape(self._shape)

    def __getitem__(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The token ids, (T, k) int64, and their log-probabilities, (T, k) float32."""
        ids, log_probs = self._parts[window // self._windows_a_part]
        row = window % self._windows_a_part
        return ids[row].astype(np.int64), np.array(log_probs[row])


class SoftLabelWriter:
    """Writes one rank's part, which appears when the block ends without an error; `folder` must exist."""

    def __init__(self, folder: Path, part: int, num_parts: int) -> None:
        self._paths = [folder / f"{part:05d}_of_{num_parts:05d}.{name}.npy" for name in _TYPES]

    def __enter__(self) -> "SoftLabelWriter":
        with disk_errors(self._paths[0].parent):
            pairs = zip(self._paths, _TYPES.values(), strict=True)
            self._files = [ArrayFile(path.with_suffix(".partial"), dtype) for path, dtype in pairs]
        return self

    def add(self, ids: np.ndarray, log_probs: np.ndarray) -> None:
        """Append (n, k) of both."""
        with disk_errors(self._paths[0].parent):
            for file, values in zip(self._files, (ids, log_probs), strict=True):
                file.append(values.reshape(-1))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file, path in zip(self._files, self._paths, strict=True):
            if kind is not None:
                file.discard()
                continue
            with disk_errors(path):
                file.finish()
                os.replace(file.path, path)


def make_empty(folder: Path) -> None:
    """Make the folder, or take from it what an interrupted run has left."""
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def is_complete(folder: Path) -> bool:
    """Whether all parts of both arrays are there, of one number of parts."""
    for first in folder.glob("00000_of_*.ids.npy"):
        num_parts = int(first.name.split("_of_")[1][:5])
        names = [f"{part:05d}_of_{num_parts:05d}.{name}.npy" for part in range(num_parts) for name in _TYPES]
        if all((folder / name).exists() for name in names):
            return True
    return False
