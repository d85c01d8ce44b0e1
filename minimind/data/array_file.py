"""One-dimensional `.npy` files: grown by a writer of unknown length, checked cheaply, mapped by a reader.

The bytes are a pure function of the values: format 1.0, little-endian, a header of always 128 bytes (what `numpy.save`
writes too).
"""

import contextlib
import os
from pathlib import Path

import numpy as np

from minimind.data.manifest import ShardError
from minimind.files import hash_file

HEADER_BYTES = 128


class ArrayFile:
    """A `.npy` file that grows; its length is written into the header at the end."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.length = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = open(path, "wb", buffering=1 << 18)  # noqa: SIM115 - closed by finish or discard
        self._file.write(npy_header(dtype, 0))

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype, copy=False).tobytes())
        self.length += len(values)

    def finish(self) -> str:
        """Make the file complete and durable; returns its sha256."""
        self._file.seek(0)
        self._file.write(npy_header(self._dtype.name, self.length))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return hash_file(self.path)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()  # flushes, and may meet the full disk once more
        with contextlib.suppress(OSError):
            self.path.unlink()


def npy_header(dtype: str, length: int) -> bytes:
    """The 128 bytes before the values."""
    descr = np.dtype(dtype).newbyteorder("<").str
    fields = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({length},), }}"
    magic = b"\x93NUMPY\x01\x00"
    room = HEADER_BYTES - len(magic) - 2
    return magic + room.to_bytes(2, "little") + fields.ljust(room - 1).encode("ascii") + b"\n"


def check_array_file(path: Path, dtype: str, length: int) -> None:
    """Raise `ShardError` unless the file is there with this type and length; reads the header alone."""
    try:
        with open(path, "rb", buffering=0) as file:
            found = file.read(HEADER_BYTES)
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing") from None
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from None
    if found != npy_header(dtype, length):
        raise ShardError(f"{path} is damaged: its header is not that of {length} values of {dtype}")
    expected = HEADER_BYTES + length * np.dtype(dtype).itemsize
    if size != expected:
        raise ShardError(f"{path} is damaged: it has {size} bytes, {length} values of {dtype} take {expected}")


def map_array_file(path: Path, dtype: str, length: int) -> np.ndarray:
    """The values, (length,), mapped read-only."""
    check_array_file(path, dtype, length)  # again: reading a map beyond a file cut since would end the process
    little_endian = np.dtype(dtype).newbyteorder("<")
    return np.memmap(path, dtype=little_endian, mode="r", offset=HEADER_BYTES, shape=(length,))
