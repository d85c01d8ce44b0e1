"""How long a run is: what of its configuration only follows once the data is known. Knows nothing of engines."""

import dataclasses

from minimind.config.resolve import Resolved
from minimind.errors import UserError


def resolved_steps(resolved: Resolved, num_samples: int) -> Resolved:
    """Fill in what depends on the data: `steps` from `epochs`, and the length of the warm-up.

    Raises:
        UserError: fewer samples than one optimizer step takes, or a warm-up longer than the run.
    """
    train = resolved.run.train
    assert train.global_batch_size is not None
    steps = train.steps
    if steps is None:
        steps = int(train.epochs * num_samples // train.global_batch_size)
        if steps < 1:
            raise UserError(
                f"global_batch_size: {train.global_batch_size} samples a step, but {train.epochs:g} epochs of the"
                f" shards hold {int(train.epochs * num_samples)}; lower it, shorten --seq-len, or give --steps"
            )
    warmup = train.warmup_steps
    if warmup is None and train.schedule != "deepspeed":
        warmup = max(1, steps // 50)
    if warmup is not None and warmup > steps:
        raise UserError(f"warmup_steps: {warmup} is longer than the run of {steps} steps; lower it")
    run = dataclasses.replace(
        resolved.run, train=dataclasses.replace(train, steps=steps, epochs=train.epochs, warmup_steps=warmup)
    )
    return dataclasses.replace(resolved, run=run)
