"""Around DeepSpeed's optimizer: building it, parameter groups, learning rate, clipping, one step."""

import math
from typing import Any

import deepspeed
import torch
from torch import nn

from minimind.config.rate_kinds import rate_kind
from minimind.config.resolved_run import ResolvedRun, ResolvedTrain
from minimind.parallel.experts import global_norm, split_groups
from minimind.parallel.muon import MUON, Muon


def parameter_groups(model: nn.Module, weight_decay: float, *, muon: bool = False) -> list[dict[str, Any]]:
    """Matrices (two dimensions and more, fused experts among them) decay; norms and biases do not. Experts that not
    every rank holds come in groups of their own.

    Under ZeRO-3 a parameter is flat; its real shape is `ds_shape`.

    Args:
        muon: put what has a rate of its own beside Muon apart, and say the `kind` of every group.
    """
    found: dict[str, list[nn.Parameter]] = {MUON: [], "embedding": [], "matrices": [], "vectors": []}
    names = dict(model.named_parameters())
    for name, parameter in names.items():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            kind = rate_kind(name, shape, tied="lm_head.weight" not in names)
            found[kind if muon or kind == "vectors" else "matrices"].append(parameter)
    groups: list[dict[str, Any]] = []
    for name, parameters in found.items():
        if parameters:
            decay = 0.0 if name == "vectors" else weight_decay
            groups.append({"name": name, "params": parameters, "weight_decay": decay})
            if muon:
                groups[-1]["kind"] = name
    return split_groups(groups)


def own_optimizer(resolved: ResolvedRun, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """torch's fused AdamW, or Muon beside it."""
    train = resolved.train
    assert train.betas is not None and train.eps is not None
    groups = parameter_groups(model, train.weight_decay, muon=train.optimizer == "muon")
    if train.optimizer != "muon":
        return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)
    for group in groups:
        group["lr"] = peak_rate(train, group["kind"])
        if group["kind"] == MUON:
            group["momentum"] = resolved.ds["optimizer"]["params"]["momentum"]
    dtype = torch.bfloat16 if train.precision == "bf16" and device.type != "cpu" else torch.float32
    return Muon(groups, device=device, dtype=dtype, lr=train.lr, betas=train.betas, eps=train.eps)


def peak_rate(train: ResolvedTrain, kind: str | None) -> float:
    """The peak rate of the groups of a `kind`."""
    rates = {MUON: train.muon_lr, "embedding": train.embedding_lr, "vectors": train.norm_lr}
    return rates.get(kind or "") or train.lr


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
    """Give every parameter group the rate of this step. Beside Muon each kind has a peak of its own; the schedule moves
    them in proportion."""
    train = resolved.train
    for group in engine.optimizer.param_groups:
        peak = peak_rate(train, group.get("kind"))
        group["lr"] = lr if peak == train.lr else lr * peak / train.lr
