"""Tensor parallelism, applied to a plain model from outside: DeepSpeed's AutoTP, told by `config.tensor_parallel`.

A group of `tp_size` neighbouring ranks shares the matrices of every block (Megatron's cut, arXiv 1909.08053): of
attention each rank has whole heads, of a feed-forward some inner features. All ranks of a group read the same batch,
and hold the same hidden states, embedding, norms and output matrix. Two sums over the group in a block's forward, and
two in its backward.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from minimind.model import MiniMindForCausalLM
from minimind.model.attention import Attention
from minimind.model.layers import FeedForward
from minimind.parallel.mesh import Mesh


def share_layers(model: nn.Module, mesh: Mesh | None) -> Any:
    """Prepare `deepspeed.initialize` to cut the layers over the mesh's tensor groups; gives it its `mpu`. Every rank
    calls this."""
    groups.mpu = None  # DeepSpeed keeps that of the engine before
    if mesh is None or mesh.tensor is None:
        return None
    # AutoTP takes these groups, and makes none: its own would leave out sequence groups.
    groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = mesh.tensor
    groups._DATA_PARALLEL_GROUP = mesh.averaging
    draw_apart(model, mesh.tp_rank)
    # What the batch is checked with. AutoEP refuses an mpu that tells of tensor groups, and does with AutoTP's own.
    size = mesh.num_averaging
    return SimpleNamespace(get_data_parallel_world_size=lambda: size, get_model_parallel_world_size=lambda: 1)


def _configure_groups(engine: DeepSpeedEngine, model: nn.Module) -> None:
    """In place of DeepSpeed's, which also sends the arguments of the first forward to all ranks of a group, pickled:
    an objective's functions cannot be. That they read the same batch is a matter of the order of the data."""
    engine._set_client_model(model)
    engine.mpu = groups


DeepSpeedEngine._configure_tensor_parallel_states = _configure_groups


def _is_counted_everywhere(parameter: nn.Parameter) -> bool:
    """Whether each rank of a tensor group has another part of a parameter. DeepSpeed's stages 1 and 2 forget routed
    experts here, and leave those of all but the first rank out of the gradient norm."""
    return is_model_parallel_parameter(parameter) or is_moe_param(parameter)


stage_1_and_2.is_model_parallel_parameter = _is_counted_everywhere
for _layer in (LinearLayer, LinearAllreduce):  # a compiled block leaves its graph for the collectives
    _layer.forward = torch.compiler.disable(_layer.forward)


class _SumGradient(torch.autograd.Function):
    """The same hidden states; their gradient is the sum over a tensor group."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def sum_gradients_once(model: MiniMindForCausalLM, mesh: Mesh | None) -> None:
    """After `deepspeed.initialize`: what several matrices read that are cut by their outputs gets its gradient summed
    over the tensor group once, and not, as AutoTP does it, for each of them."""
    if mesh is None or mesh.tensor is None or LinearLayer.tp_overlap_comm:
        return

    @torch.compiler.disable
    def sum_once(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return _SumGradient.apply(output, mesh.tensor)

    blocks: Any = model.model.layers
    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        readers: list[Any] = [(block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))]
        if isinstance(mlp, FeedForward):
            readers.append((block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)))
        for norm, layers in readers:
            norm.register_forward_hook(sum_once)
            for layer in layers:
                layer.mp_group = None  # it sums nothing by itself


def draw_apart(model: nn.Module, rank: int) -> None:
    """Let attention's dropout differ between the ranks of a tensor group, which have different heads. All else that is
    drawn stays the same on all of them, as are the hidden states that it falls on."""
    for module in model.modules():
        if isinstance(module, Attention) and module.dropout:
            states: list[Tensor] = []
            module.register_forward_pre_hook(functools.partial(_draw_own, states, rank))
            module.register_forward_hook(functools.partial(_draw_together, states), always_call=True)


def _draw_own(states: list[Tensor], rank: int, module: Attention, _inputs: Any) -> None:
    on_cpu = module.q_proj.weight.device.type == "cpu"
    # A number that all ranks draw, and again when the block is recomputed.
    seed = (int(torch.randint(2**48, ())) << 14) + rank
    states.append(torch.get_rng_state() if on_cpu else get_accelerator().get_rng_state())
    (torch.manual_seed if on_cpu else get_accelerator().manual_seed)(seed)


def _draw_together(states: list[Tensor], module: Attention, _inputs: Any, _output: Any) -> None:
    on_cpu = module.q_proj.weight.device.type == "cpu"
    (torch.set_rng_state if on_cpu else get_accelerator().set_rng_state)(states.pop())
