"""Portable checkpoint: float32 weights and optimizer state, keyed by parameter name, for any topology.

Converted from DeepSpeed's files tensor by tensor and kept beside the checkpoint as plain safetensors files: one for the
weights and one for each kind of optimizer state. Works without DeepSpeed.
"""

import contextlib
import dataclasses
import functools
import os
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
    FileRecord,
    read_manifest,
    verify_files,
)
from minimind.checkpoints.safetensors import write_safetensors
from minimind.files import fsync_folder, hash_file, new_folder, replace_file
from minimind.parallel.expert_names import EnginePart

BUFFERS = "buffers"
"""The key of what a model carries beside its parameters."""
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
    tensors = [(key, name) for key in checkpoint.keys for name in checkpoint.shapes if key in checkpoint.keys_of(name)]
    with tqdm(total=len(tensors), unit="tensor", desc="converting", disable=None) as bar:

        def read(key: str, name: str) -> torch.Tensor:
            bar.update()
            return checkpoint.read(name, key)

        for key in checkpoint.keys:
            shapes = {name: checkpoint.shapes[name] for of, name in tensors if of == key}
            write_safetensors(partial / _file_name(key), shapes, functools.partial(read, key))
    buffers = checkpoint.buffers()
    shapes = {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    write_safetensors(partial / _file_name(BUFFERS), shapes, buffers.__getitem__)
    states = checkpoint.model_states
    conversion = {
        "source_sha256": source,
        "keys": list(checkpoint.keys),
        "optimizer_step": checkpoint.optimizer.scalars.get("step", 0.0),
        "optimizer_scalars": checkpoint.optimizer.scalars,
        "group_settings": checkpoint.optimizer.group_settings,
        "loss_scaler": checkpoint.optimizer.loss_scaler,
        "grad_scaler": states[CLIENT_STATE_KEY].get("grad_scaler"),
        "lr_scheduler": states.get("lr_scheduler"),
        **{name: states[name] for name in ENGINE_COUNTERS},
    }
    files = tuple(FileRecord.of(partial, partial / _file_name(key)) for key in (*checkpoint.keys, BUFFERS))
    manifest = dataclasses.replace(checkpoint.manifest, files=files, conversion=conversion)
    replace_file(partial / MANIFEST_NAME, manifest.to_json())
    fsync_folder(partial)


def _file_name(key: str) -> str:
    return f"{key}.safetensors"


class PortableCheckpoint:
    """The tensors of a portable form, read one at a time.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        keys = [*self.manifest.conversion["keys"], BUFFERS]
        try:
            self._files = {key: safe_open(os.fspath(folder / _file_name(key)), framework="pt") for key in keys}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: cannot be read: {error}") from None
        self.names = {key: frozenset(file.keys()) for key, file in self._files.items()}
        """The parameters (for `BUFFERS`, the buffers) that there is a tensor of, for each key."""

    def keys_of(self, name: str) -> tuple[str, ...]:
        """What there is of a parameter: `fp32`, and the tensors of its optimizer state."""
        return tuple(key for key in self.manifest.conversion["keys"] if name in self.names[key])

    def read(self, part: EnginePart, key: str) -> torch.Tensor:
        """A part of one tensor, float32, in host memory; no more than the part is read."""
        if not part.index:
            return self._files[key].get_tensor(part.name)
        # Contiguous, as parameters are: torch's fused optimizers take a state of other strides for what it is not.
        return self._files[key].get_slice(part.name)[part.index].contiguous()
