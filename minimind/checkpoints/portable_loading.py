"""The portable form of a checkpoint into an engine of any world size and ZeRO stage."""

from collections.abc import Mapping
from pathlib import Path

import deepspeed
import torch

from minimind.checkpoints.manifest import CheckpointError
from minimind.checkpoints.portable import ENGINE_COUNTERS, PortableCheckpoint
from minimind.checkpoints.zero_partitions import MUON_KEY, WEIGHT
from minimind.config.resolved_run import ResolvedRun
from minimind.parallel.expert_names import EnginePart, find_part
from minimind.parallel.loss_scale import set_grad_scaler, set_loss_scaler
from minimind.parallel.optimizer_state import finish_parameters, make_states, set_parameter

Parts = Mapping[str, EnginePart]
"""An engine's name of a parameter or buffer -> the part of the model's tensor that it is."""


def load_portable(engine: deepspeed.DeepSpeedEngine, folder: Path, resolved: ResolvedRun) -> None:
    """Set an engine's weights, buffers, optimizer state and counters. Every rank calls this, and each reads what it
    holds.

    Raises:
        CheckpointError: the parameters or the optimizer are not those of the checkpoint.
    """
    source = PortableCheckpoint(folder)
    parameters = dict(engine.module.named_parameters())
    parts = {name: part_of(name, resolved) for name in (*parameters, *dict(engine.module.named_buffers()))}
    differing = {parts[name].name for name in parameters} ^ source.names
    if differing:
        raise CheckpointError(f"{folder}: {min(differing)} is not in both the checkpoint and the model")
    _set_buffers(engine, source, parts)
    conversion = source.manifest.conversion
    stage, step = resolved.zero.stage, conversion["optimizer_step"]
    states = {name: [key for key in source.keys_of(parts[name].name) if key != WEIGHT] for name in parameters}
    if stage:
        make_states(engine, step, states.__getitem__, lambda name: source.read(parts[name], MUON_KEY))
    for name, parameter in parameters.items():
        weight = source.read(parts[name], WEIGHT)
        tensors = {key: source.read(parts[name], key) for key in states[name]}
        set_parameter(engine, parameter, weight, tensors, stage=stage, step=step)
    finish_parameters(engine, stage=stage)
    for counter in ENGINE_COUNTERS:
        setattr(engine, counter, conversion[counter])
    if engine.lr_scheduler is not None and conversion["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(conversion["lr_scheduler"])
    set_loss_scaler(engine, conversion["loss_scaler"])
    set_grad_scaler(engine, conversion["grad_scaler"])


def part_of(name: str, resolved: ResolvedRun) -> EnginePart:
    """Which part of which of the model's tensors this rank's engine calls `name`."""
    ep_size = resolved.train.ep_size
    return find_part(name, resolved.model, ep_size, torch.distributed.get_rank() % ep_size)


def _set_buffers(engine: deepspeed.DeepSpeedEngine, source: PortableCheckpoint, parts: Parts) -> None:
    missing = set(source.buffer_names)
    for name, buffer in engine.module.named_buffers():
        if parts[name].name in source.buffer_names:
            buffer.copy_(source.read_buffer(parts[name]))
            missing.discard(parts[name].name)
    if missing:
        raise CheckpointError(f"buffer {min(missing)} of the checkpoint is not in the model")
