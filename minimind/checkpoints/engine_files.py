"""One rank's files of a checkpoint: collected from DeepSpeed, copied to host memory, written and hashed.

DeepSpeed decides names and content; writing happens here, so that nothing fails between its collectives and the bytes
on the disk are the ones that were hashed.
"""

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch.utils._pytree import tree_leaves, tree_map

from minimind.accelerator import default_device, has_streams, synchronize
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

    def save(self, state_dict: Any, path: str) -> None:
        """Keep what belongs into the file `path`."""
        self.collected[Path(path).name] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """The content of a file, in host memory.

        Raises:
            CheckpointError: it cannot be read, or refers to code.
        """
        return load_states(Path(path), _CLASSES, mmap=False)

    def _do_nothing(self, *args: Any, **options: Any) -> bool:
        return True

    create = makedirs = commit = _do_nothing  # parts of the interface; the folder is there


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
    for tensor in tree_leaves(states):
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(sizes.values()) + len(states) * (1 << 20)


class HostCopies:
    """Copies of tensors in host memory that is kept between saves (page-locked where they come from CUDA)."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def copy(self, states: States) -> States:
        """The same content that training no longer changes; tensors that are one stay one. Waits for the device."""
        kept, self._kept = self._kept, []
        done: dict[Any, torch.Tensor] = {}

        def copy_leaf(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return copy.copy(leaf)  # a loss scale changes during training
            key = (leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype)
            if key not in done or not leaf.numel():
                host = kept[len(self._kept)] if len(self._kept) < len(kept) else None
                if host is None or host.shape != leaf.shape or host.dtype != leaf.dtype:
                    host = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=has_streams(leaf.device))
                self._kept.append(host)
                done[key] = host.copy_(leaf.detach(), non_blocking=has_streams(leaf.device))
            return done[key]

        copied = tree_map(copy_leaf, states, is_leaf=lambda value: isinstance(value, torch.Size))
        synchronize(default_device())
        return copied


def write_states(folder: Path, states: States) -> list[FileRecord]:
    """Write files and bring them to the disk; gives their sizes and hashes.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    records = []
    for name, state in states.items():
        file = HashedFile(folder / name)
        torch.save(state, file)  # type: ignore[arg-type]
        records.append(file.finish())
    return records


def record_written(folder: Path, below: str) -> list[FileRecord]:
    """Flush and hash the files that DeepSpeed wrote by itself into `folder/below` (its NVMe swap files)."""
    records = []
    for path in sorted(path for path in (folder / below).rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        records.append(FileRecord.of(folder, path))
    return records


class HashedFile:
    """A file being written, hashed on the way. An error is raised by `finish`, because torch's writer, which is C++,
    would turn one in the middle into another."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._digest = path, 0, hashlib.sha256()
        self._error: OSError | None = None
        self._file = open(path, "wb")  # noqa: SIM115 (closed by finish)

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
        """Part of the interface; `finish` flushes."""

    def finish(self) -> FileRecord:
        """Flush to the disk, and close; name, size and hash of the file.

        Raises:
            OSError: something could not be written.
        """
        try:
            with self._file:
                if self._error is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            self._error.filename = str(self._path)
            raise self._error
        return FileRecord(self._path.name, self._size, self._digest.hexdigest())
