"""Around DeepSpeed's optimizer: parameter groups, learning rate, clipping, one step."""

import math
from typing import Any

import deepspeed
import torch
from torch import nn

from minimind.config.resolved_run import ResolvedRun
from minimind.parallel.experts import global_norm, split_groups


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


def clips_here(resolved: ResolvedRun) -> bool:
    """Whether `optimizer_step` clips: at stage 0 DeepSpeed clips without telling the norm."""
    return resolved.zero.stage == 0


def optimizer_step(engine: deepspeed.DeepSpeedEngine, resolved: ResolvedRun) -> torch.Tensor | float | None:
    """Clip and update; the global gradient norm before clipping. Every rank calls this, once a step, after the last
    backward.

    A step with a NaN or infinite gradient changes nothing: ZeRO 1-3 see it in their norm, stage 0 through AdamW's
    `found_inf`.
    """
    if clips_here(resolved):
        scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
        if scaler is not None:
            scaler.unscale_(engine.optimizer)
        grad_norm = clip_gradients(engine.module, resolved.train.max_grad_norm or math.inf)
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


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, resolved: ResolvedRun, lr: float) -> None:
    """Give every parameter group the rate of this step.

    Muon's matrices and the rest may have peak rates of their own in the JSON (`muon_lr`, `adam_lr`); the schedule moves
    all of them in proportion.
    """
    params = resolved.ds["optimizer"]["params"]
    peak = resolved.train.lr
    for group in engine.optimizer.param_groups:
        own_peak = params.get("muon_lr" if group.get("use_muon") else "adam_lr", peak)
        group["lr"] = lr * own_peak / peak
