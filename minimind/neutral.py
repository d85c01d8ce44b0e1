"""The form of a checkpoint that belongs to no topology: float32 weights and optimizer state by parameter name.

Made from DeepSpeed's files tensor by tensor, kept beside the checkpoint, and set into an engine of any world size and
ZeRO stage. Plain safetensors files, one for the weights and one for each kind of optimizer state.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
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
_ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


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
        **{name: states[name] for name in _ENGINE_COUNTERS},
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


def load_neutral(engine: deepspeed.DeepSpeedEngine, folder: Path, zero_stage: int) -> None:
    """Set an engine's weights, optimizer state and counters. Every rank calls this, and each reads every tensor.

    Raises:
        CheckpointError: the parameters or the optimizer are not those of the checkpoint.
    """
    source = NeutralCheckpoint(folder)
    parameters = dict(engine.module.named_parameters())
    missing = set(parameters) ^ set(source.names())
    if missing:
        raise CheckpointError(f"{folder}: {sorted(missing)[0]} is not in both the checkpoint and the model")
    conversion = source.manifest.conversion
    state_keys = [key for key in source.keys if key != WEIGHT]
    step = conversion["optimizer_step"]
    if zero_stage == 0:
        _set_whole(engine, source, parameters, state_keys, step)
    else:
        _make_states(engine.optimizer, state_keys, step)
        for name, parameter in parameters.items():
            weight = source.read(name, WEIGHT).to(engine.device)
            if zero_stage == 3:
                _set_split_weight(parameter, weight)
            safe_set_full_fp32_param(parameter, weight)
            for key in state_keys:
                safe_set_full_optimizer_state(parameter, source.read(name, key).to(engine.device), key)
        if zero_stage < 3:
            engine.optimizer.update_lp_params()
    for counter in _ENGINE_COUNTERS:
        setattr(engine, counter, conversion[counter])
    if engine.lr_scheduler is not None and conversion["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(conversion["lr_scheduler"])
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if conversion["loss_scaler"] and scaler is not None and getattr(scaler, "dynamic", False):
        vars(scaler).update(conversion["loss_scaler"])


def _set_whole(
    engine: deepspeed.DeepSpeedEngine,
    source: NeutralCheckpoint,
    parameters: dict[str, torch.nn.Parameter],
    state_keys: Sequence[str],
    step: float,
) -> None:
    """Stage 0: the optimizer holds the parameters themselves."""
    for name, parameter in parameters.items():
        parameter.data.copy_(source.read(name, WEIGHT))
        state = {key: source.read(name, key).to(parameter.device) for key in state_keys}
        engine.optimizer.state[parameter] = {"step": torch.tensor(step, device=parameter.device), **state}


def _make_states(optimizer: Any, state_keys: Sequence[str], step: float) -> None:
    """Stages 1 to 3: give each flat partition the state that its optimizer would only make in its first step."""
    for partition in flat_partitions(optimizer):
        state = optimizer.optimizer.state[partition]
        # DeepSpeed's CPU Adam counts in an int, torch's optimizers in a tensor beside the weights.
        counts_in_int = type(optimizer.optimizer).__module__.startswith("deepspeed.")
        state["step"] = int(step) if counts_in_int else torch.tensor(step, device=partition.device)
        for key in state_keys:
            state[key] = torch.zeros_like(partition)
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def flat_partitions(optimizer: Any) -> Sequence[torch.Tensor]:
    """This rank's float32 partitions, by whatever name this ZeRO stage has for them."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise CheckpointError(f"{type(optimizer).__name__}: not an optimizer whose state can be set from a neutral form")


def _set_split_weight(parameter: torch.nn.Parameter, weight: torch.Tensor) -> None:
    """Stage 3: the weights that forward gathers. Every rank takes part in the gathering."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.data.copy_(weight)
