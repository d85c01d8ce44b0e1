"""Set the weights and the optimizer state of an engine, in any ZeRO stage: each rank what it holds itself.

One parameter at a time; the optimizer's state, which only its first step would make, is made before (`make_states`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.moe.utils import is_moe_param
from torch import Tensor

from minimind.errors import UserError


def drop_states(engine: deepspeed.DeepSpeedEngine) -> None:
    """Forget the optimizer's states before others are loaded: both at once would need twice the memory."""
    for parameter in engine.module.parameters():
        if getattr(parameter, "_hp_mapping", None) is not None:
            parameter._hp_mapping.optim_fragment = None  # views of them
    getattr(engine.optimizer, "optimizer", engine.optimizer).state.clear()


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
    raise UserError(f"{type(optimizer).__name__}: not an optimizer whose state can be set from another topology")


@torch.no_grad()
def set_parameter(
    engine: deepspeed.DeepSpeedEngine,
    parameter: Any,
    owner: int,
    keys: Sequence[str],
    read: Callable[[str | None, int, int], Tensor],
    *,
    stage: int,
    scalars: Mapping[str, float],
) -> None:
    """Set what this rank has of a parameter (of experts: of its own) and of its optimizer state. Every rank calls this,
    and `finish_parameters` after the last; under stages 1 to 3 `make_states` before the first.

    Args:
        owner: where every rank has all of it, the number of the rank that reads it for the others, modulo their number.
        keys: the tensors of its optimizer state.
        read: gives the elements from one to another of the float32 weight (None) or of a state, laid flat.
    """
    if stage == 0:  # the optimizer holds the parameters themselves
        group = _holders(engine, parameter)
        source = torch.distributed.get_global_rank(group, owner % torch.distributed.get_world_size(group))
        states = {key: torch.empty_like(parameter) for key in keys}
        for key, held in ((None, parameter.data), *states.items()):
            if torch.distributed.get_rank() == source:
                held.copy_(read(key, 0, held.numel()).view(held.shape))
            torch.distributed.broadcast(held, source, group=group)
        counts = {key: torch.tensor(value, device=parameter.device) for key, value in scalars.items()}
        engine.optimizer.state[parameter] = {**counts, **states}
    elif stage == 3:
        _set_split(parameter, keys, read)
    elif parameter._hp_mapping is not None:  # this rank's part of the parameter
        part = parameter._hp_mapping.lp_fragment_address
        for key in (None, *keys):
            parameter._hp_mapping.get_hp_fragment(key).copy_(read(key, part.start, part.start + part.numel))


def _holders(engine: deepspeed.DeepSpeedEngine, parameter: Any) -> Any:
    """The ranks that have the same parameter at stage 0, as DeepSpeed's broadcast of the first weights knows them."""
    if is_moe_param(parameter):
        return engine.expert_data_parallel_group[parameter.group_name]
    return engine.seq_data_parallel_group


def finish_parameters(engine: deepspeed.DeepSpeedEngine, *, stage: int) -> None:
    """Round the float32 weights of stages 1 to 3 to those that forward uses. Every rank calls this."""
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:  # as after a step: what stayed gathered is gathered anew
        optimizer.checkpoint_event_prologue()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()


def _set_split(parameter: Any, keys: Sequence[str], read: Callable[[str | None, int, int], Tensor]) -> None:
    """Stage 3: this rank's part of everything. The last ranks' parts may be filled up, or empty."""
    length, end = parameter.ds_tensor.ds_numel, parameter.ds_numel
    start = min(end, length * parameter._z3_optimizer._get_param_partition_rank(parameter))
    stop = min(end, start + length)
    for key in (None, *keys):
        part = torch.zeros(length)
        if start < stop:
            part[: stop - start] = read(key, start, stop)
        parameter._z3_optimizer.set_local_hp_param(part, parameter, key)
