"""The weights of a running engine as a plain model on every rank, to decode with: without hooks, partitions, experts on
other ranks."""

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups
from torch import Tensor

from minimind.config.resolved_run import ResolvedRun
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.apply import apply_kernels
from minimind.model.lora import add_adapters
from minimind.parallel.expert_names import find_part


@torch.no_grad()
def gather_model(engine: Any, resolved: ResolvedRun) -> MiniMindForCausalLM:
    """The engine's model in evaluation mode, its present weights in the type that the engine computes with. What a rank
    holds whole is shared with the engine and not copied. Every rank calls this.
    """
    with torch.device("meta"):
        model = MiniMindForCausalLM(resolved.model)
        if resolved.train.lora is not None:
            add_adapters(model, resolved.train.lora)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    ep_size, tp_size, tensors = resolved.train.ep_size, resolved.train.tp_size, dict[str, Tensor]()
    for name, parts in _read(engine, ep_size, tp_size):
        for place, tensor in enumerate(parts):
            place = place if len(parts) > 1 else 0
            part = find_part(name, resolved.model, ep_size, place, tp_size=tp_size, tp_rank=place % tp_size)
            if not part.index:
                tensors[part.name] = tensor
                continue
            whole = tensors.setdefault(part.name, tensor.new_empty(shapes[part.name]))
            whole[part.index] = tensor
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    apply_kernels(model, engine.device)
    return model.eval()


def _read(engine: Any, ep_size: int, tp_size: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Name and values of each parameter and buffer; of an expert's, and of what a tensor group shares, those of all
    ranks of its group."""
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            here = parameter.detach()
            if hasattr(parameter, "ds_id"):  # released when the block ends
                here = here.clone()
            parts, group, size = [here], None, 1
            if ep_size > 1 and is_moe_param(parameter):
                group, size = groups._get_expert_parallel_group(parameter.group_name), ep_size
            elif is_model_parallel_parameter(parameter):
                group, size = groups.get_tensor_model_parallel_group(), tp_size
            if size > 1:
                parts = [torch.empty_like(here) for _ in range(size)]
                torch.distributed.all_gather(parts, here.contiguous(), group=group)
        yield name, parts
    for name, buffer in engine.module.named_buffers():
        yield name, [buffer]
