"""Portable checkpoint: float32 weights and optimizer state, keyed by parameter name, for any topology.

Converted from DeepSpeed's files tensor by tensor and kept beside the checkpoint as plain safetensors files: one for the
weights and one for each kind of optimizer state. Works without DeepSpeed.
"""

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.folder import portable_folder
from minimind.checkpoints.manifest import (
    CLIENT_STATE_KEY,
    MANIFEST_NAME,
    CheckpointError,
    CheckpointManifest,
    FileRecord,
    read_manifest,
    verify_files,
)
from minimind.checkpoints.safetensors import write_safetensors
from minimind.checkpoints.zero_partitions import WEIGHT
from minimind.files import fsync_folder, hash_file, new_folder, replace_file
from minimind.parallel.expert_names import EnginePart

# The file of what a model carries beside its parameters.
_BUFFERS = "buffers"
# What DeepSpeed's own load sets on the engine beside tensors.
ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def make_portable(folder: Path) -> Path:
    """The portable form of a checkpoint that has been verified: the one made before, or a new one. One rank calls this.

    An interruption leaves nothing that looks whole.

    Raises:
        CheckpointError: the files are of a kind that is not read, or the form cannot be written.
    """
    target = portable_folder(folder)
    source = hash_file(folder / MANIFEST_NAME)
    with contextlib.suppress(CheckpointError):
        manifest = read_manifest(target)
        if manifest.conversion.get("source_sha256") == source:
            verify_files(target, manifest)
            return target
    checkpoint = TrainingCheckpoint(folder)
    try:
        with new_folder(target) as partial:
            _write(checkpoint, partial, source)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}; free space") from None
    return target


def _write(checkpoint: TrainingCheckpoint, partial: Path, source: str) -> None:
    names = {key: [name for name in checkpoint.shapes if key in checkpoint.keys_of(name)] for key in checkpoint.keys}
    with tqdm(total=sum(map(len, names.values())), unit="tensor", desc="converting", disable=None) as bar:

        def read(key: str, name: str) -> torch.Tensor:
            bar.update()
            return checkpoint.read(name, key)

        for key in checkpoint.keys:
            shapes = {name: checkpoint.shapes[name] for name in names[key]}
            write_safetensors(partial / _file_name(key), shapes, functools.partial(read, key))
    buffers = checkpoint.buffers()
    write_safetensors(partial / _file_name(_BUFFERS), _shapes_of(buffers), buffers.__getitem__)
    states = checkpoint.model_states
    conversion = {
        "source_sha256": source,
        "keys": list(checkpoint.keys),
        "optimizer_step": checkpoint.optimizer_step,
        "loss_scaler": checkpoint.loss_scaler,
        "grad_scaler": states[CLIENT_STATE_KEY].get("grad_scaler"),
        "lr_scheduler": states.get("lr_scheduler"),
        **{name: states[name] for name in ENGINE_COUNTERS},
    }
    files = [_file_name(key) for key in (*checkpoint.keys, _BUFFERS)]
    records = tuple(FileRecord(name, (partial / name).stat().st_size, hash_file(partial / name)) for name in files)
    fields = {**vars(checkpoint.manifest), "files": records, "conversion": conversion}
    replace_file(partial / MANIFEST_NAME, CheckpointManifest(**fields).to_json())
    fsync_folder(partial)


def _file_name(key: str) -> str:
    return f"{key}.safetensors"


def _shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Sequence[int]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class PortableCheckpoint:
    """The tensors of a portable form, read one at a time.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        keys = [*self.manifest.conversion["keys"], _BUFFERS]
        try:
            self._files = {key: safe_open(os.fspath(folder / _file_name(key)), framework="pt") for key in keys}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: cannot be read: {error}") from None
        self._names = {key: frozenset(file.keys()) for key, file in self._files.items()}

    @property
    def names(self) -> frozenset[str]:
        """The parameters that are there."""
        return self._names[WEIGHT]

    @property
    def buffer_names(self) -> frozenset[str]:
        """What the model carries beside its parameters."""
        return self._names[_BUFFERS]

    def keys_of(self, name: str) -> tuple[str, ...]:
        """What there is of a parameter: `fp32`, and the tensors of its optimizer state."""
        return tuple(key for key in self.manifest.conversion["keys"] if name in self._names[key])

    def read(self, part: EnginePart, key: str) -> torch.Tensor:
        """A part of one tensor, float32, in host memory; no more than the part is read."""
        if not part.index:
            return self._files[key].get_tensor(part.name)
        # Contiguous, as parameters are: torch's fused optimizers take a state of other strides for what it is not.
        return self._files[key].get_slice(part.name)[part.index].contiguous()

    def read_buffer(self, part: EnginePart) -> torch.Tensor:
        """A buffer of the model, float32."""
        return self.read(part, _BUFFERS)
