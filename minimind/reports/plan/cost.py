"""Time and money of a planned run, and how many checkpoints it keeps."""

from dataclasses import dataclass

from minimind.config.run_config import TrainConfig
from minimind.reports.plan.planned_run import PlannedRun


@dataclass(frozen=True)
class RunCost:
    """What a run takes."""

    hours: float
    gpu_hours: float
    price: float | None
    basis: str
    """Where the speed comes from, in words."""


def estimate_cost(
    plan: PlannedRun,
    tokens_per_second: float | None,
    mfu: float,
    peak: tuple[float, str] | None,
    price: float | None,
) -> RunCost | None:
    """Time and cost of all tokens; None where the tokens or the speed are not known.

    Args:
        tokens_per_second: of all ranks together; where None, it follows from `mfu` and the `peak` of one device.
        peak: FLOP/s of one device, and its name.
        price: of one GPU for an hour.
    """
    if plan.tokens is None:
        return None
    model, seq_len = plan.resolved.model, plan.resolved.data.seq_len
    if tokens_per_second is not None:
        basis = f"at {tokens_per_second:,.0f} tokens/s"
    elif peak is not None:
        tokens_per_second = mfu * peak[0] * plan.world_size / model.flops_per_token(seq_len)
        basis = f"at {tokens_per_second:,.0f} tokens/s = {mfu:.0%} of {plan.world_size} x {peak[1]}"
    else:
        return None
    hours = plan.tokens / tokens_per_second / 3600
    gpu_hours = hours * plan.world_size
    return RunCost(hours, gpu_hours, None if price is None else gpu_hours * price, basis)


def kept_checkpoints(train: TrainConfig, steps: int | None) -> int:
    """The most checkpoints that lie on the disk at once, of those that retention keeps."""
    if steps is None or not train.save_every:
        return max(1, train.keep_last) if train.save_every else 1
    saved = -(-steps // train.save_every)
    if not train.keep_last:
        return saved
    milestones = steps // train.keep_every if train.keep_every else 0
    return min(saved, train.keep_last + milestones + train.keep_best)
