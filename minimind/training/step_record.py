"""Steps whose figures are still on the device, and their reduction over the ranks into records."""

import math
import resource
import sys
from dataclasses import dataclass

import torch

from minimind.checkpoints.manifest import TrainState
from minimind.distributed.collectives import all_reduce_sum
from minimind.training.record.run_files import StepRecord
from minimind.training.step_timer import StepTimer, describe_times


@dataclass(frozen=True)
class PendingStep:
    """A step whose figures are on the device."""

    state: TrainState  # after the step
    loss: torch.Tensor  # () this rank's share of the global mean loss
    aux_loss: torch.Tensor  # () this rank's share of the mean auxiliary loss of the routers, 0 for a dense model
    grad_norm: torch.Tensor | float | None  # global, before clipping
    lr: float
    loss_scale: float | None
    expert_counts: torch.Tensor | None  # (num_moe_layers, num_experts + 1) of this rank; None for a dense model


def has_bad_loss(pending: list[PendingStep]) -> bool:
    """Whether a loss of this rank is NaN or infinite."""
    return not bool(torch.isfinite(torch.stack([item.loss for item in pending])).all())


def reduce_steps(pending: list[PendingStep], timer: StepTimer, tokens_per_step: int) -> list[StepRecord]:
    """The records of pending steps, reduced over the ranks. Every rank calls this; it waits for the device."""
    losses = torch.stack([item.loss for item in pending])
    aux_losses = torch.stack([item.aux_loss for item in pending])
    # Every rank's own times ride along, each in its place, so they cost no collective.
    times = torch.zeros(torch.distributed.get_world_size(), 2)
    times[torch.distributed.get_rank()] = torch.tensor(timer.own_seconds()) / len(pending)
    summed = all_reduce_sum(torch.cat([losses, aux_losses, times.flatten().to(losses)])).tolist()
    means, aux_means = summed[: len(pending)], summed[len(pending) : 2 * len(pending)]
    counts = [item.expert_counts for item in pending if item.expert_counts is not None]
    loads = all_reduce_sum(torch.stack(counts)).cpu() if counts else None
    seconds = timer.elapsed() / len(pending)
    timer.restart()
    peak = peak_memory_bytes(losses.device)
    records = []
    for i, item in enumerate(pending):
        record: StepRecord = {
            "step": item.state.step,
            "loss": means[i],
            "lr": item.lr,
            "grad_norm": None if item.grad_norm is None else float(item.grad_norm),
            "tokens_seen": item.state.tokens_seen,
            "consumed_samples": item.state.consumed_samples,
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_step / seconds,
            "peak_memory_bytes": peak,
        }
        if item.loss_scale is not None:
            record["loss_scale"] = item.loss_scale
        if loads is not None:
            record["aux_loss"] = aux_means[i]
            record.update(summarize_load(item.state.step, loads[i]))
        records.append(record)
    records[-1].update(describe_times(pending[-1].state.step, summed[2 * len(pending) :]))
    return records


def summarize_load(step: int, counts: torch.Tensor) -> StepRecord:
    """The expert figures of a step's record.

    Args:
        counts: (num_moe_layers, num_experts + 1) `LossParts.expert_counts` summed over micro-batches and ranks.
    """
    load, dropped = counts[:, :-1].double().cpu(), counts[:, -1].double().cpu()
    total = load.sum(dim=1)  # (num_moe_layers,)
    shares = load / total.unsqueeze(1)
    most = math.log(load.shape[1]) or 1.0
    entropy = torch.special.entr(shares).sum(dim=1) / most if load.shape[1] > 1 else torch.ones_like(total)
    lost = dropped / total
    return {
        "step": step,
        "load_entropy": float(entropy.mean()),
        "dropped_share": float(lost.mean()),
        "expert_load": load.long().tolist(),
        "expert_balance": {
            "min": load.amin(dim=1).long().tolist(),
            "max": load.amax(dim=1).long().tolist(),
            "entropy": entropy.tolist(),
            "dropped": lost.tolist(),
        },
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this rank has held: device memory on CUDA, resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
