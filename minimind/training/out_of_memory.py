"""A training run whose memory is full: the rank, the place in its step, and the flags that lower what it needs."""

import contextlib
from collections.abc import Iterator

import torch

from minimind.config.resolved_run import ResolvedRun
from minimind.distributed.environment import RankEnvironment
from minimind.distributed.out_of_memory import describe, is_full_memory
from minimind.distributed.watchdog import Watchdog
from minimind.errors import OneRankError


@contextlib.contextmanager
def full_memory_in_words(
    resolved: ResolvedRun, env: RankEnvironment, device: torch.device, watchdog: Watchdog
) -> Iterator[None]:
    """Turn an allocation that failed in the block into one line.

    Raises:
        OneRankError: the memory of this rank's device, or of its host, is full.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        line = describe(error, device, cures(resolved), who=env.speaker, place=watchdog.position)
        raise OneRankError(line) from error


def cures(resolved: ResolvedRun) -> list[str]:
    """What lowers the memory of this run, the cheapest first."""
    train = resolved.train
    found = []
    if train.micro_batch_size > 1:
        found.append(f"lower --micro-batch-size {train.micro_batch_size}")
    if not train.activation_checkpointing:
        found.append("pass --activation-checkpointing")
    if resolved.zero.stage < 3:
        found.append(f"take a ZeRO stage above {resolved.zero.stage} (--ds-config)")
    found.append(f"shorten --seq-len {resolved.data.seq_len}")
    return [*found, "--dry-run itemises what a rank needs"]
