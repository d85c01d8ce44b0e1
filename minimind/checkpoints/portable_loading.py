"""The portable form of a checkpoint into an engine of any world size and ZeRO stage."""

from pathlib import Path
from typing import Any

import deepspeed
import torch

from minimind.checkpoints.manifest import CheckpointError
from minimind.checkpoints.portable import BUFFERS, ENGINE_COUNTERS, PortableCheckpoint
from minimind.checkpoints.zero_partitions import WEIGHT
from minimind.config.resolved_run import ResolvedRun
from minimind.parallel.expert_names import EnginePart, find_part
from minimind.parallel.loss_scale import set_grad_scaler, set_loss_scaler
from minimind.parallel.optimizer_state import finish_parameters, make_states, set_parameter


def load_portable(engine: deepspeed.DeepSpeedEngine, folder: Path, resolved: ResolvedRun) -> None:
    """Set an engine's weights, buffers, optimizer state and counters. Every rank calls this, and each reads what it
    holds.

    Raises:
        CheckpointError: the parameters or the optimizer are not those of the checkpoint.
    """
    source = PortableCheckpoint(folder)
    parameters = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}
    parts = {name: part_of(name, resolved) for name in (*parameters, *dict(engine.module.named_buffers()))}
    differing = {parts[name].name for name in parameters} ^ source.names[WEIGHT]
    if differing:
        raise CheckpointError(f"{folder}: {min(differing)} is not in both the checkpoint and the model")
    missing = set(source.names[BUFFERS])
    for name, buffer in engine.module.named_buffers():
        if parts[name].name in source.names[BUFFERS]:
            buffer.copy_(source.read(parts[name], BUFFERS))
            missing.discard(parts[name].name)
    if missing:
        raise CheckpointError(f"buffer {min(missing)} of the checkpoint is not in the model")
    conversion = source.manifest.conversion
    stage, scalars = (
        resolved.zero.stage,
        {"step": conversion["optimizer_step"], **conversion.get("optimizer_scalars", {})},
    )
    states = {name: [key for key in source.keys_of(parts[name].name) if key != WEIGHT] for name in parameters}
    if stage:
        make_states(engine, scalars, states.__getitem__)
    for name, parameter in parameters.items():
        weight = source.read(parts[name], WEIGHT)
        tensors = {key: source.read(parts[name], key) for key in states[name]}
        set_parameter(engine, parameter, weight, tensors, stage=stage, scalars=scalars)
    finish_parameters(engine, stage=stage)
    for counter in ENGINE_COUNTERS:
        setattr(engine, counter, conversion[counter])
    if engine.lr_scheduler is not None and conversion["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(_with_numbers(conversion["lr_scheduler"]))
        # Its own state does not hold what it has set.
        saved = conversion.get("group_settings") or [{}]
        for number, group in enumerate(engine.optimizer.param_groups):
            group.update(saved[min(number, len(saved) - 1)])
    set_loss_scaler(engine, conversion["loss_scaler"])
    set_grad_scaler(engine, conversion["grad_scaler"])


def _with_numbers(state: Any) -> Any:
    """A scheduler's state out of JSON, where keys that are numbers (the milestones of MultiStepLR) became text."""
    if not isinstance(state, dict):
        return state
    return {int(key) if key.isdecimal() else key: _with_numbers(value) for key, value in state.items()}


def part_of(name: str, resolved: ResolvedRun) -> EnginePart:
    """Which part of which of the model's tensors this rank's engine calls `name`."""
    ep_size = resolved.train.ep_size
    return find_part(name, resolved.model, ep_size, torch.distributed.get_rank() % ep_size)
