"""From a plain model to a DeepSpeed engine, and one optimizer step on it. The only caller of `deepspeed.initialize`.

The optimizer is torch's fused AdamW (on CPU the fastest, and the same arithmetic in every ZeRO stage), DeepSpeed's CPU
Adam under offload, or what the JSON names. Knows nothing of data, schedules or checkpoints.
"""

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
from deepspeed.runtime.zero.config import get_zero_config
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from minimind.config.resolve import Resolved
from minimind.config.deepspeed_keys import offload_device, zero_stage
from minimind.errors import UserError
from minimind.parallel.experts import (
    compute_experts_here,
    global_norm,
    leave_out_of_compilation,
    split_groups,
    take_over_experts,
    watch_experts,
)
from minimind.model import MiniMindForCausalLM
from minimind.model.layers import FeedForward
from minimind.schema import nearest


def check_ds_config(ds: dict[str, Any]) -> None:
    """Let DeepSpeed's own parsers read the configuration, before any process group is made.

    Raises:
        UserError: DeepSpeed refuses a key or a value, or has no optimizer or scheduler of that name and parameters.
    """
    for section, parse in (
        ("zero_optimization", get_zero_config),
        ("bf16", get_bfloat16_config),
        ("fp16", get_float16_config),
        ("", _parse_for_one_rank),
    ):
        try:
            parse(copy.deepcopy(ds))
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError, DeepSpeedConfigError) as error:
            details: list[Any] = getattr(error, "errors", list)()  # pydantic's ValidationError is a ValueError
            reason = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in details)
            where = f"{section}: " if section else ""
            raise UserError(f"DeepSpeed config: {where}{reason or first_line(error)}") from None
    _try_optimizer(ds)


def _parse_for_one_rank(ds: dict[str, Any]) -> None:
    """The whole of DeepSpeed's parsing. Without a process group it takes the world for one rank."""
    ds["train_batch_size"] = ds["train_micro_batch_size_per_gpu"] * ds["gradient_accumulation_steps"]
    DeepSpeedConfig(ds)


def _try_optimizer(ds: dict[str, Any]) -> None:
    """Build the optimizer and the scheduler that the JSON names for one small parameter."""
    kind, params = ds["optimizer"]["type"], ds["optimizer"]["params"]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    if kind.lower() not in DEEPSPEED_OPTIMIZERS:  # DeepSpeed's own need compiled ops: tried when the engine is built
        build = getattr(torch.optim, kind, None)
        if not isinstance(build, type) or not issubclass(build, torch.optim.Optimizer):
            known = [*sorted(DEEPSPEED_OPTIMIZERS), *torch.optim.__all__]
            raise UserError(f"DeepSpeed config: optimizer.type: '{kind}' is unknown{nearest(kind, known)}")
        optimizer = _try("optimizer", kind, lambda: build([nn.Parameter(torch.zeros(1))], **params))
        if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS and not ds.get("zero_allow_untested_optimizer"):
            raise UserError(
                f"DeepSpeed config: optimizer.type: {kind} is untested under ZeRO; allow it by "
                '"zero_allow_untested_optimizer": true, or use another'
            )
    if "scheduler" in ds:
        kind, params = ds["scheduler"]["type"], ds["scheduler"].get("params") or {}
        schedule = getattr(lr_schedules if kind in VALID_LR_SCHEDULES else torch.optim.lr_scheduler, kind, None)
        if not isinstance(schedule, type):
            raise UserError(
                f"DeepSpeed config: scheduler.type: '{kind}' is unknown{nearest(kind, VALID_LR_SCHEDULES)} "
                f"(DeepSpeed's: {', '.join(VALID_LR_SCHEDULES)})"
            )
        _try("scheduler", kind, lambda: schedule(optimizer, **params))


def _try(section: str, kind: str, build: Callable[[], Any]) -> Any:
    logging.disable(logging.WARNING)  # what DeepSpeed says of this one is said again of the real one
    try:
        return build()
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"DeepSpeed config: {section}.params of {kind}: {first_line(error)}") from None
    finally:
        logging.disable(logging.NOTSET)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def build_model(resolved: Resolved, device: torch.device) -> MiniMindForCausalLM:
    """The model with its initial weights, partitioned over the ranks as it is built where the stage is 3.

    Every rank draws the same weights from the seed, in the same order and in float32, so every stage and every world
    size starts alike. Every rank calls this.
    """
    run = resolved.run
    if resolved.zero_stage == 3:
        place: contextlib.AbstractContextManager = deepspeed.zero.Init(config_dict_or_path=resolved.ds)
    else:
        place = device
    torch.manual_seed(run.train.seed)
    with place:
        model = MiniMindForCausalLM(run.model)
    model.set_activation_checkpointing(run.train.activation_checkpointing)
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices (two dimensions and more, fused experts among them) decay; norms and biases do not. Experts
    that not every rank holds come in groups of their own.

    Under ZeRO-3 a parameter is flat; its real shape is `ds_shape`.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) >= 2 else plain).append(parameter)
    groups = [
        {"name": "matrices", "params": decayed, "weight_decay": weight_decay},
        {"name": "vectors", "params": plain, "weight_decay": 0.0},
    ]
    return split_groups([group for group in groups if group["params"]])


def build_engine(resolved: Resolved, model: MiniMindForCausalLM) -> deepspeed.DeepSpeedEngine:
    """Hand the model to DeepSpeed. Every rank calls this.

    Raises:
        UserError: an op that the configuration needs (CPU Adam under offload) does not build here.
    """
    train, ds = resolved.run.train, copy.deepcopy(resolved.ds)
    weight_decay = train.weight_decay or 0.0
    build_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    if train.optimizer == "adamw" and offload_device(ds, "optimizer") is None:
        # With a client optimizer DeepSpeed would only keep the section for its own bookkeeping.
        del ds["optimizer"]

        def build_optimizer(_given: Any) -> torch.optim.Optimizer:
            # Called when the experts have been taken over: the parameters are others than before.
            groups = parameter_groups(model, weight_decay)
            return torch.optim.AdamW(
                groups, lr=train.lr or 0.0, betas=train.betas or (0.9, 0.95), eps=train.eps or 0.0, fused=True
            )

    if clips_here(resolved):
        ds["gradient_clipping"] = 0.0
    take_over_experts(resolved, model)
    if gathers_by_block(ds):
        _gather_by_block(model)
    with _build_errors():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer,
            model_parameters=None if build_optimizer is not None else parameter_groups(model, weight_decay),
            config=ds,
            dist_init_required=False,
        )
    if nothing_to_reduce(resolved, engine.optimizer, torch.distributed.get_world_size()):
        engine.enable_backward_allreduce = False
    watch_experts(resolved, model)
    compute_experts_here(model)
    if train.compile:
        leave_out_of_compilation(model)
        engine.compile()
    return engine


def nothing_to_reduce(resolved: Resolved, optimizer: Any, world_size: int) -> bool:
    """Whether DeepSpeed's averaging of gradients over the ranks is a copy there and back.

    On one rank, where gradients are whole: at stage 0, and at stage 1 under the BF16 optimizer. Elsewhere the reduction
    also moves gradients to where the update finds them; and at stage 0 it gives idle experts their zeros.
    """
    if world_size > 1:
        return False
    return isinstance(optimizer, BF16_Optimizer) or (resolved.zero_stage == 0 and not resolved.run.model.use_moe)


def gathers_by_block(ds: dict[str, Any]) -> bool:
    """Whether ZeRO-3 gathers and releases the weights of a whole block, and not those of each small module in it.

    Fewer hooks and collectives, for one block's weights at a time. Not where the JSON says itself what a unit
    is, and not with weights on NVMe, whose buffers are counted by the parameter.
    """
    zero = ds.get("zero_optimization", {})
    chosen = zero.get("stage3_module_granularity_threshold") or zero.get("leaf_module")
    return zero_stage(ds) == 3 and not chosen and offload_device(ds, "param") != "nvme"


def _gather_by_block(model: MiniMindForCausalLM) -> None:
    """Blocks with experts stay as they are: DeepSpeed has its own layers in them."""
    for block in model.model.layers:
        if isinstance(block.mlp, FeedForward):
            set_z3_leaf_module(block, True)


def clips_here(resolved: Resolved) -> bool:
    """Whether `optimizer_step` clips: at stage 0 DeepSpeed clips without telling the norm."""
    return resolved.zero_stage == 0


def optimizer_step(engine: deepspeed.DeepSpeedEngine, resolved: Resolved) -> torch.Tensor | float | None:
    """Clip and update; the global gradient norm before clipping. Every rank calls this, once a step, after the last
    backward.

    A step with a NaN or infinite gradient changes nothing: ZeRO 1-3 see it in their norm, stage 0 through AdamW's
    `found_inf`.
    """
    if clips_here(resolved):
        scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
        if scaler is not None:
            scaler.unscale_(engine.optimizer)
        grad_norm = clip_gradients(engine.module, resolved.run.train.max_grad_norm or math.inf)
        if scaler is None:
            engine.optimizer.found_inf = (~torch.isfinite(grad_norm)).float()
        engine.step()
        return grad_norm
    engine.step()
    return engine.get_global_grad_norm()


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients in place to a global 2-norm of at most `max_norm`; the norm before that, () on the device.
    Every rank calls this."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = global_norm(parameters)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, resolved: Resolved, lr: float) -> None:
    """Give every parameter group the rate of this step.

    Muon's matrices and the rest may have peak rates of their own in the JSON (`muon_lr`, `adam_lr`); the schedule moves
    all of them in proportion.
    """
    params = resolved.ds["optimizer"]["params"]
    peak = resolved.run.train.lr or lr
    for group in engine.optimizer.param_groups:
        own_peak = params.get("muon_lr" if group.get("use_muon") else "adam_lr", peak)
        group["lr"] = lr * own_peak / peak


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """The dynamic loss scale of fp16, or None in other precisions."""
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if scaler is not None:
        return float(scaler.get_scale())
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


@contextlib.contextmanager
def _build_errors() -> Iterator[None]:
    """Turn the failures of DeepSpeed's just-in-time builds into one line."""
    try:
        yield
    except (RuntimeError, ImportError) as error:
        text = str(error)
        if any(word in text for word in ("Ninja", "ninja", "compil", "Error building", "Unable to JIT", "nvcc")):
            raise UserError(
                f"DeepSpeed could not build an op that this configuration needs: {text.strip().splitlines()[0]}; "
                "install a C++ compiler and ninja (and the CUDA toolkit on a GPU), or choose one without offload"
            ) from error
        raise
