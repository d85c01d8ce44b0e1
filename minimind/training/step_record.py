"""One optimizer step as a line of metrics.jsonl: what waits on the device for it, and the figures that follow from it.

Knows nothing of files, ranks and the loop.
"""

import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class PendingStep:
    """A step whose figures still lie on the device."""

    step: int
    loss: torch.Tensor  # () this rank's share of the global mean loss
    aux_loss: torch.Tensor  # () this rank's share of the mean auxiliary loss of the routers, 0 for a dense model
    grad_norm: torch.Tensor | float | None  # global, before clipping
    lr: float
    loss_scale: float | None
    choices: torch.Tensor | None  # (num_moe_layers, num_experts + 1) this rank's `count_choices`, or None when dense


def make_record(
    item: PendingStep,
    loss: float,
    grad_norm: float | None,
    seconds: float,
    *,
    samples: int,
    tokens: int,
    flops_per_token: float,
    peak_flops: float | None,
    device: torch.device,
) -> dict[str, Any]:
    """The record of a step that took `seconds`, with its global mean loss and gradient norm.

    Args:
        samples, tokens: of one step over all ranks.
        flops_per_token: of a training step; `peak_flops`: of all devices together, in FLOP/s (None: no MFU).
    """
    speed = tokens / seconds
    record = {
        "step": item.step,
        "loss": loss,
        "lr": item.lr,
        "grad_norm": grad_norm,
        "tokens_seen": item.step * tokens,
        "consumed_samples": item.step * samples,
        "step_seconds": seconds,
        "tokens_per_second": speed,
        "mfu": speed * flops_per_token / peak_flops if peak_flops else None,
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    if item.loss_scale is not None:
        record["loss_scale"] = item.loss_scale
    return record


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this rank has held: device memory on CUDA, resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
