"""From a plain model to a DeepSpeed engine. The only caller of `deepspeed.initialize`.

The optimizer is torch's fused AdamW (on CPU the fastest, and the same arithmetic in every ZeRO stage), Muon beside it,
DeepSpeed's CPU Adam under offload, or the one that the JSON names.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import set_z3_leaf_module

from minimind.accelerator import has_streams
from minimind.config.deepspeed_keys import offload_device, zero_stage
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DTYPE_NAMES, Precision
from minimind.distributed.collectives import log
from minimind.model import MiniMindForCausalLM
from minimind.model.attention import Attention
from minimind.model.kernels.apply import apply_kernels, chosen_kernels
from minimind.model.kernels.compiled import Compiler
from minimind.model.layers import FeedForward
from minimind.model.lora import add_adapters, train_only
from minimind.parallel.compilation import compile_model, settle_compilation
from minimind.parallel.device_checks import leave_checks_on_device
from minimind.parallel.experts import (
    AUTOEP_EXPERTS,
    attach_router_hooks,
    choose_grouped_product,
    only_own_experts,
    replace_experts,
)
from minimind.parallel.mesh import Mesh, deepspeed_batch
from minimind.parallel.muon import Muon, attach_layouts
from minimind.parallel.op_builds import build_ops
from minimind.parallel.optimizer import clips_here, own_optimizer, parameter_groups
from minimind.parallel.sequence import share_sequences
from minimind.parallel.tensor_parallel import share_layers, sum_gradients_once

# It prints at every start how much memory there is, and at every resume how it reads.
vars(bf16_optimizer).update(see_memory_usage=lambda *_, **__: None, print=lambda *_: None)


def build_model(resolved: ResolvedRun, device: torch.device, mesh: Mesh | None = None) -> MiniMindForCausalLM:
    """The model with its initial weights, partitioned over the ranks as it is built where the stage is 3.

    Every rank draws the same weights from the seed, in the same order and in float32, so every stage and every world
    size starts alike. Below stage 3 they are rounded to what the engine stores as they are drawn, and a rank keeps its
    own experts alone: the start needs no more memory than a step. Every rank calls this.

    Args:
        mesh: None: ranks share neither sequences nor layers.
    """
    torch.manual_seed(resolved.train.seed)
    if resolved.zero.stage == 3:
        group, mpu = (None, None) if mesh is None else (mesh.averaging, mesh.mpu)
        ds = {**resolved.ds, **deepspeed_batch(resolved)}
        with deepspeed.zero.Init(config_dict_or_path=ds, data_parallel_group=group, mpu=mpu):
            model = MiniMindForCausalLM(resolved.model)
    else:
        with device, _default_dtype(resolved.zero.weights), only_own_experts(resolved.train.ep_size):
            model = MiniMindForCausalLM(resolved.model)
    model.set_activation_checkpointing(resolved.train.activation_checkpointing)
    if resolved.train.lora is not None:
        add_adapters(model, resolved.train.lora)
    if resolved.train.keeps_frozen:
        train_only(model, resolved.trained)
    return model


@contextlib.contextmanager
def _default_dtype(precision: Precision) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, DTYPE_NAMES[precision]))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_engine(
    resolved: ResolvedRun, model: MiniMindForCausalLM, mesh: Mesh | None = None
) -> deepspeed.DeepSpeedEngine:
    """Hand the model to DeepSpeed. Every rank calls this.

    Args:
        mesh: that of `build_model`.

    Raises:
        UserError: an op that the configuration needs (CPU Adam under offload) does not build here.
    """
    train, ds = resolved.train, {**copy.deepcopy(resolved.ds), **deepspeed_batch(resolved)}
    build_ops(resolved, log)
    build_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    if resolved.owns_optimizer:
        # With a client optimizer DeepSpeed would only keep the section for its own bookkeeping.
        del ds["optimizer"]
        if train.optimizer == "muon":
            ds["zero_force_ds_cpu_optimizer"] = False
        device = torch.device(get_accelerator().current_device_name())

        def build_optimizer(_given: Any) -> torch.optim.Optimizer:
            # DeepSpeed calls this after expert replacement, so the parameter objects are the new ones.
            return own_optimizer(resolved, model, device)

    chosen_kernels()  # a bad choice is an error before the model is partitioned
    if clips_here(resolved):
        ds["gradient_clipping"] = 0.0
    replace_experts(resolved, model)
    if gathers_by_block(ds):
        _gather_by_block(model)
    if resolved.zero.stage == 3:
        _require_input_gradient(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer,
        model_parameters=None if build_optimizer is not None else parameter_groups(model, train.weight_decay),
        config=ds,
        mpu=share_layers(model, mesh),
        dist_init_required=False,
    )
    if isinstance(engine.basic_optimizer, Muon):
        attach_layouts(engine, engine.basic_optimizer, None if mesh is None else mesh.tensor)
    if has_streams(engine.device):
        leave_checks_on_device(engine.optimizer, resolved)
    if nothing_to_reduce(resolved, engine.optimizer):
        engine.enable_backward_allreduce = False
    sum_gradients_once(model, mesh)
    attach_router_hooks(resolved, model)
    choose_grouped_product(resolved, model, engine.device)
    apply_kernels(model, engine.device, AUTOEP_EXPERTS)
    if mesh is not None:
        share_sequences(model, mesh)
    if settle_compilation(train.compile, engine.device.type)[0]:
        compile_model(model, Compiler(log, required=train.compile == "on"))
    return engine


def _require_input_gradient(model: MiniMindForCausalLM) -> None:
    """Let the input of the first module with something to train require a gradient, where all before it is frozen.

    ZeRO-3 gathers a module's weights for the backward, and releases them, by hooks on tensors that require one.
    """
    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]
    first = next(part for part in parts if any(parameter.requires_grad for parameter in part.parameters()))
    if first is not model.model.embed_tokens:
        first.register_forward_pre_hook(_with_gradient)


@torch.compiler.disable
def _with_gradient(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    hidden_states, *others = inputs
    return (hidden_states.detach().requires_grad_(), *others) if torch.is_grad_enabled() else None


def nothing_to_reduce(resolved: ResolvedRun, optimizer: Any) -> bool:
    """Whether gradient averaging would be a no-op round trip.

    On one rank, where gradients are whole: at stage 0, and at stage 1 under the BF16 optimizer. Elsewhere the reduction
    also moves gradients to where the update finds them; and at stage 0 it gives idle experts their zeros.
    """
    if resolved.num_averaging > 1:
        return False
    return isinstance(optimizer, BF16_Optimizer) or (resolved.zero.stage == 0 and not resolved.model.use_moe)


def gathers_by_block(ds: dict[str, Any]) -> bool:
    """Whether ZeRO-3 gathers and releases the weights of a whole block, and not those of each small module in it.

    Fewer hooks and collectives, for one block's weights at a time. Not where the JSON says itself what a unit
    is, and not with weights on NVMe, whose buffers are counted by the parameter.
    """
    zero = ds.get("zero_optimization", {})
    chosen = zero.get("stage3_module_granularity_threshold") or zero.get("leaf_module")
    return zero_stage(ds) == 3 and not chosen and offload_device(ds, "param") != "nvme"


def _gather_by_block(model: MiniMindForCausalLM) -> None:
    """In a block with experts DeepSpeed has its own layers: there, the attention and the feed-forwards that every token
    visits."""
    for block in model.model.layers:
        is_dense = isinstance(block.mlp, FeedForward)
        for module in [block] if is_dense else block.modules():
            if is_dense or isinstance(module, Attention | FeedForward):
                set_z3_leaf_module(module, True)
