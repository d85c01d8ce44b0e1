"""Set the weights and the optimizer state of an engine, in any ZeRO stage, from whole tensors.

DeepSpeed's own functions set one parameter at a time; the optimizer's state, which only its first step would make,
is made before (`make_states`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from minimind.errors import UserError


def make_states(
    engine: deepspeed.DeepSpeedEngine,
    scalars: Mapping[str, float],
    keys_of: Callable[[str], Sequence[str]],
) -> None:
    """Stages 1 to 3: give each flat partition the state that its optimizer would only make in its first step.

    Args:
        scalars: what the optimizer counts, alike for all parameters (`step`).
        keys_of: the state tensors of a parameter, by the engine's name of it.

    Raises:
        UserError: the state of this kind of optimizer cannot be set.
    """
    optimizer = engine.optimizer
    # DeepSpeed's CPU Adam counts in an int, torch's optimizers in a tensor beside the weights.
    counts_in_int = type(optimizer.optimizer).__module__.startswith("deepspeed.ops.adam")
    groups = _first_attribute(optimizer, ("bit16_groups", "bf16_groups", "fp16_groups"))
    # This rank's float32 partitions, by whatever name this ZeRO stage has for them.
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    for group, partition in zip(groups, _first_attribute(optimizer, names), strict=True):
        keys = keys_of(engine.param_names[group[0]])
        state = optimizer.optimizer.state[partition]
        state.update({key: torch.tensor(value, device=partition.device) for key, value in scalars.items()})
        if counts_in_int:
            state["step"] = int(scalars["step"])
        state.update({key: torch.zeros_like(partition) for key in keys})
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _first_attribute(optimizer: Any, names: Sequence[str]) -> Any:
    for name in names:
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise UserError(f"{type(optimizer).__name__}: not an optimizer whose state can be set from a portable checkpoint")


def set_parameter(
    engine: deepspeed.DeepSpeedEngine,
    parameter: nn.Parameter,
    weight: Tensor,
    states: Mapping[str, Tensor],
    *,
    stage: int,
    scalars: Mapping[str, float],
) -> None:
    """Set a parameter and its optimizer state from whole float32 tensors (of experts: this rank's part). Every rank
    calls this, and `finish_parameters` after the last; under stages 1 to 3 `make_states` before the first."""
    if stage == 0:  # the optimizer holds the parameters themselves
        parameter.data.copy_(weight)
        counts = {key: torch.tensor(value, device=parameter.device) for key, value in scalars.items()}
        moved = {key: tensor.to(parameter.device) for key, tensor in states.items()}
        engine.optimizer.state[parameter] = {**counts, **moved}
    elif stage == 3:
        _set_split(parameter, weight, states)
    else:  # this rank's part of the parameter, which may be none
        safe_set_full_fp32_param(parameter, weight)
        for key, tensor in states.items():
            safe_set_full_optimizer_state(parameter, tensor, key)


def finish_parameters(engine: deepspeed.DeepSpeedEngine, *, stage: int) -> None:
    """Round the float32 weights of stages 1 and 2 to those that forward uses."""
    if stage in (1, 2):
        engine.optimizer.update_lp_params()


def _set_split(parameter: Any, weight: Tensor, states: Mapping[str, Tensor]) -> None:
    """Stage 3: the weight that forward gathers, and this rank's part of everything.

    DeepSpeed's functions for whole tensors fail where the parts do not divide a parameter evenly, so the parts are cut
    here.
    """
    group = parameter.ds_process_group
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # its group's first rank
        if torch.distributed.get_rank(group) == 0:
            parameter.data.copy_(weight)
    length = parameter.ds_tensor.ds_numel
    start = length * parameter._z3_optimizer._get_param_partition_rank(parameter)

    def own_part(tensor: Tensor) -> Tensor:
        part = torch.zeros(length)
        piece = tensor.reshape(-1)[start : start + length]
        part[: piece.numel()] = piece
        return part

    safe_set_local_fp32_param(parameter, own_part(weight))
    for key, tensor in states.items():
        safe_set_local_optimizer_state(parameter, own_part(tensor), key)
