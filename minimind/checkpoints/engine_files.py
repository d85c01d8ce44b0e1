"""One rank's files of a checkpoint: collected from DeepSpeed, copied to host memory, written and hashed.

DeepSpeed decides names and content; writing happens here, so that nothing fails between its collectives and the bytes
on the disk are the ones that were hashed.
"""

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from minimind.checkpoints.manifest import FileRecord
from minimind.checkpoints.safe_load import load_states

# All that DeepSpeed has in its files beside tensors and plain values.
_CLASSES = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)

States = dict[str, Any]
"""File name -> the content that DeepSpeed gives it."""


class StateFiles(CheckpointEngine):
    """DeepSpeed's way to its files: collects instead of writing, and loads without running code in the files."""

    def __init__(self) -> None:
        super().__init__()
        self.collected: States = {}

    def create(self, info: Any) -> None:
        """Part of the interface; nothing has to be done."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Part of the interface; the folder is there."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep what belongs into the file `path`."""
        self.collected[Path(path).name] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """The content of a file, in host memory.

        Raises:
            CheckpointError: it cannot be read, or refers to code.
        """
        return load_states(Path(path), _CLASSES, mmap=False)

    def commit(self, info: Any) -> bool:
        """Part of the interface; nothing has to be done."""
        return True


@contextlib.contextmanager
def use_state_files(engine: deepspeed.DeepSpeedEngine) -> Iterator[StateFiles]:
    """Let `engine` save into and load through a `StateFiles` while the block runs."""
    before, files = engine.checkpoint_engine, StateFiles()
    engine.checkpoint_engine = files
    # It would copy scripts on rank 0 between collectives, where a full disk leaves the other ranks waiting.
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield files
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script


def count_bytes(states: States) -> int:
    """About what the files will take on the disk: their tensors, shared storages counted once, and the rest."""
    sizes = {}
    for tensor in _tensors(states):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(sizes.values()) + len(states) * (1 << 20)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class HostCopies:
    """Copies of tensors in host memory that is kept between saves (page-locked where they come from CUDA)."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def copy(self, states: States) -> States:
        """The same content that training no longer changes; tensors that are one stay one. Waits for the device."""
        kept, self._kept = self._kept, []
        done: dict[Any, torch.Tensor] = {}

        def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if key not in done or not tensor.numel():
                place = len(self._kept)
                host = kept[place] if place < len(kept) else None
                if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._kept.append(host)
                done[key] = host.copy_(tensor.detach(), non_blocking=True)
            return done[key]

        copied = _copy(states, copy_tensor)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied


def _copy(value: Any, copy_tensor: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return copy_tensor(value)
    if isinstance(value, Mapping):
        # The kinds of mapping that are written: dict and OrderedDict.
        return type(value)((key, _copy(item, copy_tensor)) for key, item in value.items())  # type: ignore[call-arg]
    if type(value) in (list, tuple):
        return type(value)(_copy(item, copy_tensor) for item in value)
    return copy.copy(value)  # a loss scale changes during training


def write_states(folder: Path, states: States) -> list[FileRecord]:
    """Write files and bring them to the disk; gives their sizes and hashes.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    records = []
    for name, state in states.items():
        with HashedFile(folder / name) as file:
            torch.save(state, file)  # type: ignore[arg-type]
        records.append(file.record())
    return records


def record_written(folder: Path, below: str) -> list[FileRecord]:
    """Flush and hash the files that DeepSpeed wrote by itself into `folder/below` (its NVMe swap files)."""
    records = []
    for path in sorted(path for path in (folder / below).rglob("*") if path.is_file()):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        records.append(FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, digest.hexdigest()))
    return records


class HashedFile:
    """A file being written, hashed on the way. An error is raised at its end, because torch's writer, which is C++,
    would turn one in the middle into another."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._size = 0
        self._error: OSError | None = None
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)

    def write(self, data: Any) -> int:
        """Append bytes."""
        size = memoryview(data).nbytes
        if self._error is None:
            try:
                self._file.write(data)
                self._digest.update(data)
                self._size += size
            except OSError as error:
                self._error = error
        return size

    def flush(self) -> None:
        """Part of the interface; the end flushes."""

    def record(self) -> FileRecord:
        """Name, size and hash of the file, once it is closed."""
        return FileRecord(self._path.name, self._size, self._digest.hexdigest())

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if self._error is None and error[0] is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as failure:
            self._error = failure
        with contextlib.suppress(OSError):
            self._file.close()
        if self._error is not None:
            self._error.filename = str(self._path)
            raise self._error
