"""The form of a checkpoint that belongs to no topology: float32 weights and optimizer state by parameter name.

Made from DeepSpeed's files tensor by tensor and kept beside the checkpoint: plain safetensors files, one for the
weights and one for each kind of optimizer state. Knows nothing of engines, and needs no DeepSpeed.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from minimind.atomic import fsync_folder, hash_file, replace_file
from minimind.checkpoint_files import (
    MANIFEST_NAME,
    CheckpointError,
    CheckpointManifest,
    FileRecord,
    neutral_folder,
    read_manifest,
    verify_files,
)
from minimind.checkpoint_retention import partial_folder, publish
from minimind.consolidate import WEIGHT, TrainingCheckpoint
from minimind.safetensors_stream import write_safetensors

# What DeepSpeed's own load sets on the engine beside tensors.
ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def make_neutral(folder: Path) -> Path:
    """The neutral form of a checkpoint that has been verified: the one made before, or a new one. One rank calls this.

    An interruption leaves nothing that looks whole.

    Raises:
        CheckpointError: the files are of a kind that is not read, or the form cannot be written.
    """
    target = neutral_folder(folder)
    source = hash_file(folder / MANIFEST_NAME)
    with contextlib.suppress(CheckpointError):
        manifest = read_manifest(target)
        if manifest.conversion.get("source_sha256") == source:
            verify_files(target, manifest)
            return target
    checkpoint = TrainingCheckpoint(folder)
    partial = partial_folder(target)
    try:
        partial.mkdir()
        _write(checkpoint, partial, source)
        publish(partial, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}; free space") from None
    return target


def _write(checkpoint: TrainingCheckpoint, partial: Path, source: str) -> None:
    files = [f"{key}.safetensors" for key in checkpoint.keys]
    with tqdm(total=len(files) * len(checkpoint.shapes), unit="tensor", desc="converting", disable=None) as bar:

        def read(key: str, name: str) -> torch.Tensor:
            bar.update()
            return checkpoint.read(name, key)

        for key, file in zip(checkpoint.keys, files, strict=True):
            write_safetensors(partial / file, checkpoint.shapes, functools.partial(read, key))
    states = checkpoint.model_states
    conversion = {
        "source_sha256": source,
        "keys": list(checkpoint.keys),
        "optimizer_step": checkpoint.optimizer_step,
        "loss_scaler": checkpoint.loss_scaler,
        "lr_scheduler": states.get("lr_scheduler"),
        **{name: states[name] for name in ENGINE_COUNTERS},
    }
    records = tuple(FileRecord(name, (partial / name).stat().st_size, hash_file(partial / name)) for name in files)
    fields = {**vars(checkpoint.manifest), "files": records, "conversion": conversion}
    replace_file(partial / MANIFEST_NAME, CheckpointManifest(**fields).to_json())
    fsync_folder(partial)


class NeutralCheckpoint:
    """The tensors of a neutral form, read one at a time.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        self.keys: Sequence[str] = self.manifest.conversion["keys"]
        try:
            self._files = {
                key: safe_open(os.fspath(folder / f"{key}.safetensors"), framework="pt") for key in self.keys
            }
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: cannot be read: {error}") from None

    def names(self) -> Iterator[str]:
        """The parameters that are there."""
        yield from self._files[WEIGHT].keys()

    def read(self, name: str, key: str) -> torch.Tensor:
        """One tensor, float32, in host memory."""
        return self._files[key].get_tensor(name)
