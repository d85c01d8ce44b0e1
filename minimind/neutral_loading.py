"""The topology-free form of a checkpoint into an engine of any world size and ZeRO stage.

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

from minimind.checkpoint_files import CheckpointError
from minimind.consolidate import WEIGHT
from minimind.neutral_form import ENGINE_COUNTERS, NeutralCheckpoint


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
            tensors = {key: source.read(name, key) for key in source.keys}
            (_set_split if zero_stage == 3 else _set_flat)(parameter, tensors)
        if zero_stage < 3:
            engine.optimizer.update_lp_params()
    for counter in ENGINE_COUNTERS:
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


def _set_flat(parameter: torch.nn.Parameter, tensors: Mapping[str, torch.Tensor]) -> None:
    """Stages 1 and 2: this rank's part of a parameter, which may be none. The weights of forward follow later."""
    for key, tensor in tensors.items():
        if key == WEIGHT:
            safe_set_full_fp32_param(parameter, tensor)
        else:
            safe_set_full_optimizer_state(parameter, tensor, key)


def _set_split(parameter: torch.nn.Parameter, tensors: Mapping[str, torch.Tensor]) -> None:
    """Stage 3: the weight that forward gathers, and this rank's part of everything. Every rank takes part.

    DeepSpeed's functions for whole tensors fail where the parts do not divide a parameter evenly, so the parts are cut
    here.
    """
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
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
