"""A checkpoint's portable form: float32 weights and optimizer state in safetensors files, keyed by parameter name.

For keeping, and for programs that have no DeepSpeed; a resume on another topology reads DeepSpeed's own files. One file
for the weights, one for each kind of optimizer state, one for what else the model carries. Works without DeepSpeed.
"""

import contextlib
import dataclasses
import functools
import os
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from minimind.checkpoints.consolidate import ENGINE_COUNTERS, TrainingCheckpoint
from minimind.checkpoints.folder import portable_folder
from minimind.checkpoints.formats.load_model import build_from_source
from minimind.checkpoints.formats.source import open_checkpoint
from minimind.checkpoints.manifest import (
    CLIENT_STATE_KEY,
    MANIFEST_NAME,
    CheckpointError,
    FileRecord,
    read_manifest,
    verify_files,
)
from minimind.checkpoints.safetensors import write_safetensors
from minimind.checkpoints.zero_partitions import WEIGHT
from minimind.files import fsync_folder, hash_file, new_folder, replace_file

BUFFERS = "buffers"
"""The key of what a model carries beside its parameters."""


def convert(folder: Path) -> Path:
    """The portable form of a verified checkpoint, beside it: the one made before, or a new one, one tensor in memory at
    a time. A model built from it must give the probe loss that the engine gave.

    An interruption leaves nothing that looks whole.

    Raises:
        CheckpointError: the files are of a kind that is not read, the form cannot be written, or the loss differs.
    """
    target, source = portable_folder(folder), hash_file(folder / MANIFEST_NAME)
    with contextlib.suppress(CheckpointError):
        manifest = read_manifest(target)
        if manifest.conversion.get("source_sha256") == source:
            verify_files(target, manifest)
            return target
    try:
        with new_folder(target) as partial:
            _write(TrainingCheckpoint(folder), partial, source)
            _prove(folder, partial)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}; free space") from None
    return target


def _write(checkpoint: TrainingCheckpoint, partial: Path, source: str) -> None:
    tensors = [(key, name) for key in checkpoint.keys for name in checkpoint.shapes if key in checkpoint.keys_of(name)]
    with tqdm(total=len(tensors), unit="tensor", desc="converting", disable=None) as bar:

        def read(key: str, name: str) -> Tensor:
            bar.update()
            return checkpoint.read(name, key)

        for key in checkpoint.keys:
            shapes = {name: checkpoint.shapes[name] for of, name in tensors if of == key}
            write_safetensors(partial / f"{key}.safetensors", shapes, functools.partial(read, key))
    buffers, states = checkpoint.buffers(), checkpoint.model_states
    shapes = {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    write_safetensors(partial / f"{BUFFERS}.safetensors", shapes, buffers.__getitem__)
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
    files = tuple(FileRecord.of(partial, path) for path in sorted(partial.glob("*.safetensors")))
    manifest = dataclasses.replace(checkpoint.manifest, files=files, conversion=conversion)
    replace_file(partial / MANIFEST_NAME, manifest.to_json())
    fsync_folder(partial)


def _prove(folder: Path, partial: Path) -> None:
    """Build the model from the files that were written; building compares the probe loss."""
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(os.fspath(partial / f"{key}.safetensors"), framework="pt"))
            for key in (WEIGHT, BUFFERS)
        ]
        where = {name: file for file in files for name in sorted(file.keys())}
        build_from_source(open_checkpoint(folder, read=lambda name: where[name].get_tensor(name)))
