"""A checkpoint into an engine of any world size, ZeRO stage, precision and layout of experts.

Each rank reads from DeepSpeed's files what it will hold, and nothing is written.
"""

import deepspeed
import torch
from torch import Tensor

from minimind.checkpoints.consolidate import ENGINE_COUNTERS, TrainingCheckpoint
from minimind.checkpoints.manifest import CLIENT_STATE_KEY, CheckpointError
from minimind.checkpoints.zero_partitions import WEIGHT
from minimind.config.resolved_run import ResolvedRun
from minimind.parallel.expert_names import EnginePart, find_part
from minimind.parallel.loss_scale import set_grad_scaler, set_loss_scaler
from minimind.parallel.optimizer_state import finish_parameters, make_states, set_parameter


def load_resharded(engine: deepspeed.DeepSpeedEngine, checkpoint: TrainingCheckpoint, resolved: ResolvedRun) -> None:
    """Set an engine's weights, buffers, optimizer state and counters. Every rank calls this.

    Raises:
        CheckpointError: the parameters or the optimizer are not those of the checkpoint.
    """
    folder, buffers = checkpoint.folder, checkpoint.buffers()
    parameters = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}
    parts = {name: part_of(name, resolved) for name in (*parameters, *dict(engine.module.named_buffers()))}
    differing = {parts[name].name for name in parameters} ^ set(checkpoint.shapes)
    if differing:
        raise CheckpointError(f"{folder}: {min(differing)} is not in both the checkpoint and the model")
    missing = set(buffers)
    for name, buffer in engine.module.named_buffers():
        if parts[name].name in buffers:
            buffer.copy_(buffers[parts[name].name])
            missing.discard(parts[name].name)
    if missing:
        raise CheckpointError(f"buffer {min(missing)} of the checkpoint is not in the model")
    stage, scalars = resolved.zero.stage, {"step": 0.0, **checkpoint.optimizer.scalars}
    keys = {name: [key for key in checkpoint.keys_of(parts[name].name) if key != WEIGHT] for name in parameters}
    if stage:
        make_states(engine, scalars, keys.__getitem__)
    for number, (name, parameter) in enumerate(parameters.items()):

        def read(key: str | None, start: int, stop: int, part: EnginePart = parts[name]) -> Tensor:
            return checkpoint.read_range(part, key or WEIGHT, start, stop)

        set_parameter(engine, parameter, number, keys[name], read, stage=stage, scalars=scalars)
    finish_parameters(engine, stage=stage)
    states = checkpoint.model_states
    for counter in ENGINE_COUNTERS:
        setattr(engine, counter, states[counter])
    if engine.lr_scheduler is not None and states.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(states["lr_scheduler"])
        # Its own state does not hold what it has set.
        saved = checkpoint.optimizer.group_settings or [{}]
        for number, group in enumerate(engine.optimizer.param_groups):
            group.update(saved[min(number, len(saved) - 1)])
    set_loss_scaler(engine, checkpoint.optimizer.loss_scaler)
    set_grad_scaler(engine, states[CLIENT_STATE_KEY].get("grad_scaler"))


def part_of(name: str, resolved: ResolvedRun) -> EnginePart:
    """Which part of which of the model's tensors this rank's engine calls `name`."""
    ep_size, tp_size, rank = resolved.train.ep_size, resolved.train.tp_size, torch.distributed.get_rank()
    return find_part(name, resolved.model, ep_size, rank % ep_size, tp_size=tp_size, tp_rank=rank % tp_size)
