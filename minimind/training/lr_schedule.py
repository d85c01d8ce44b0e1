"""Learning rate as a pure function of the step: a resume needs nothing but the step.

Linear warm-up, then cosine, linear, constant, WSD, step or exponential.
"""

import math

from minimind.config.resolved_run import ResolvedTrain


def learning_rate(step: int, train: ResolvedTrain) -> float:
    """The rate of optimizer step `step` (0-based) of a resolved run.

    Warm-up is linear from lr/warmup_steps to lr. Afterwards, down to a floor of `min_lr_ratio * lr` at the end of the
    run: cosine follows half a cosine (arXiv 1608.03983); linear a straight line; wsd stays at lr and falls linearly
    over the last `decay_ratio` of the run (warmup-stable-decay, arXiv 2404.06395); step multiplies by `lr_gamma` every
    `lr_step_size` steps, exponential does the same smoothly, and both stop at the floor; constant stays. Beyond the end
    of the run the last value stays.
    """
    lr, steps, warmup, schedule = train.lr, train.steps, train.warmup_steps, train.schedule
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * _shape(schedule, step - warmup, steps - warmup, steps, train)


def _shape(schedule: str, done: int, length: int, steps: int, train: ResolvedTrain) -> float:
    """The rate after the warm-up as a share of lr; `done` steps of `length` are over."""
    floor = train.min_lr_ratio
    progress = min(1.0, done / max(1, length))
    if schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - (1 - floor) * progress
    if schedule == "wsd":
        decay = max(1, min(length, round(train.decay_ratio * steps)))
        return 1 - (1 - floor) * min(1.0, max(0, done - (length - decay)) / decay)
    if schedule == "step":
        return max(floor, train.lr_gamma ** (done // train.lr_step_size))
    if schedule == "exponential":
        return max(floor, train.lr_gamma ** (done / train.lr_step_size))
    return 1.0  # constant; "deepspeed" keeps its own rate and never asks
