"""The portable form of a checkpoint into an engine of any world size and ZeRO stage.

DeepSpeed's own functions set one parameter at a time; what they expect to be there (the optimizer's state before its
first step) is made first. Knows nothing of how the form was made.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from minimind.checkpoints.manifest import CheckpointError
from minimind.checkpoints.portable import ENGINE_COUNTERS, PortableCheckpoint
from minimind.checkpoints.zero_partitions import MUON_KEY, WEIGHT
from minimind.config.resolved_run import ResolvedRun
from minimind.parallel.expert_names import EnginePart, find_part
from minimind.parallel.loss_scale import set_grad_scaler, set_loss_scaler

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
    stage = resolved.zero.stage
    if stage:
        _make_states(engine, source, parts)
    for name, parameter in parameters.items():
        tensors = {key: source.read(parts[name], key) for key in source.keys_of(parts[name].name)}
        if stage == 0:
            _set_whole(engine, parameter, tensors, conversion["optimizer_step"])
        elif stage == 3:
            _set_split(parameter, tensors)
        else:
            _set_flat(parameter, tensors)
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
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


def _set_whole(
    engine: deepspeed.DeepSpeedEngine, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor], step: float
) -> None:
    """Stage 0: the optimizer holds the parameters themselves."""
    parameter.data.copy_(tensors.pop(WEIGHT))
    state = {key: tensor.to(parameter.device) for key, tensor in tensors.items()}
    engine.optimizer.state[parameter] = {"step": torch.tensor(step, device=parameter.device), **state}


def _make_states(engine: deepspeed.DeepSpeedEngine, source: PortableCheckpoint, parts: Parts) -> None:
    """Stages 1 to 3: give each flat partition the state that its optimizer would only make in its first step."""
    optimizer, step = engine.optimizer, source.manifest.conversion["optimizer_step"]
    # DeepSpeed's CPU Adam counts in an int, torch's optimizers in a tensor beside the weights.
    counts_in_int = type(optimizer.optimizer).__module__.startswith("deepspeed.ops.adam")
    partitions = zip(zero_groups(optimizer), flat_partitions(optimizer), strict=True)
    for number, (group, partition) in enumerate(partitions):
        keys = source.keys_of(parts[engine.param_names[group[0]]].name)
        state = optimizer.optimizer.state[partition]
        if MUON_KEY in keys:
            whole = [parts[engine.param_names[parameter]] for parameter in optimizer.params_in_partition[number]]
            read = [source.read(part, MUON_KEY).reshape(-1) for part in whole]
            state[MUON_KEY] = torch.cat(read).to(partition.device)
            continue
        state["step"] = int(step) if counts_in_int else torch.tensor(step, device=partition.device)
        for key in keys:
            if key != WEIGHT:
                state[key] = torch.zeros_like(partition)
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def zero_groups(optimizer: Any) -> Sequence[Sequence[torch.nn.Parameter]]:
    """The model's parameters of each of `flat_partitions`."""
    return _first_attribute(optimizer, ("bit16_groups", "bf16_groups", "fp16_groups"))


def flat_partitions(optimizer: Any) -> Sequence[torch.Tensor]:
    """This rank's float32 partitions, by whatever name this ZeRO stage has for them."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return _first_attribute(optimizer, names)


def _first_attribute(optimizer: Any, names: Sequence[str]) -> Any:
    for name in names:
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise CheckpointError(f"{type(optimizer).__name__}: not an optimizer whose state can be set from a portable form")


def _set_flat(parameter: torch.nn.Parameter, tensors: Mapping[str, torch.Tensor]) -> None:
    """Stages 1 and 2: this rank's part of a parameter, which may be none. The weights of forward follow later."""
    for key, tensor in tensors.items():
        if key == WEIGHT:
            safe_set_full_fp32_param(parameter, tensor)
        elif key != MUON_KEY:
            safe_set_full_optimizer_state(parameter, tensor, key)


def _set_split(parameter: torch.nn.Parameter, tensors: Mapping[str, torch.Tensor]) -> None:
    """Stage 3: the weight that forward gathers, and this rank's part of everything. Every rank takes part.

    DeepSpeed's functions for whole tensors fail where the parts do not divide a parameter evenly, so the parts are cut
    here.
    """
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # its group's first rank
        if torch.distributed.get_rank(group) == 0:
            parameter.data.copy_(tensors[WEIGHT])
    length = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    start = length * parameter._z3_optimizer._get_param_partition_rank(parameter)  # type: ignore[attr-defined]
    for key, tensor in tensors.items():
        part = torch.zeros(length)
        piece = tensor.reshape(-1)[start : start + length]
        part[: piece.numel()] = piece
        if key == WEIGHT:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)
