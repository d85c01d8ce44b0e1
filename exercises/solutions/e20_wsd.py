"""A learning-rate schedule."""


def wsd(step: int, steps: int, lr: float, warmup: int, decay: int, floor: float) -> float:
    """Warm up linearly (step 0 has lr / warmup), stay at lr, and fall linearly over the last `decay` steps towards
    floor * lr, which would be reached at step `steps`.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = max(0, step - (steps - decay)) / decay
    return lr * (1 - (1 - floor) * progress)
