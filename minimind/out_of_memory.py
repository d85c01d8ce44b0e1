"""A full memory, said in one line: whose, at which place of the run, with the flags that lower what it needs.

Knows the errors of torch's allocators and of Python; a process that the kernel kills says nothing, here or elsewhere.
"""

import contextlib
import re
from collections.abc import Iterator

import torch

from minimind.distributed import RankEnvironment
from minimind.ds_config import Resolved
from minimind.errors import OneRankError
from minimind.lifeline import Lifeline
from minimind.memory import format_bytes
from minimind.rendezvous import node_name


@contextlib.contextmanager
def full_memory_in_words(
    resolved: Resolved, env: RankEnvironment, device: torch.device, lifeline: Lifeline
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
        raise OneRankError(describe(error, resolved, env, device, lifeline.position)) from error


def is_full_memory(error: Exception) -> bool:
    """Whether an allocation failed: on a GPU, in torch's allocator of the host, or in Python."""
    # torch has no type of its own for the host: its allocator raises a RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def describe(error: Exception, resolved: Resolved, env: RankEnvironment, device: torch.device, position: str) -> str:
    """Rank, device, place, figures, cures."""
    on_device = isinstance(error, torch.OutOfMemoryError)
    who = f"rank {env.rank} on {node_name()}: " if env.world_size > 1 else ""
    where = str(device) if on_device else "the host"
    figures = []
    if wanted := re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE):
        figures.append(f"{_readable(wanted[1])} more were wanted")
    if on_device and device.type == "cuda":
        held, total = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[1]
        figures.append(f"tensors hold {format_bytes(held)} of {format_bytes(total)}")
    said = f" ({', '.join(figures)})" if figures else ""
    return f"{who}{where} is out of memory at {position}{said}: {'; '.join(cures(resolved))}"


def cures(resolved: Resolved) -> list[str]:
    """What lowers the memory of this run, the cheapest first."""
    train = resolved.run.train
    found = []
    if (train.micro_batch_size or 1) > 1:
        found.append(f"lower --micro-batch-size {train.micro_batch_size}")
    if not train.activation_checkpointing:
        found.append("pass --activation-checkpointing")
    if resolved.zero_stage < 3:
        found.append(f"take a ZeRO stage above {resolved.zero_stage} (--ds-config)")
    found.append(f"shorten --seq-len {resolved.run.data.seq_len}")
    return [*found, "--dry-run itemises what a rank needs"]


def _readable(size: str) -> str:
    """The host's allocator counts bytes."""
    count = size.removesuffix("bytes").strip()
    return format_bytes(int(count)) if count.isdecimal() else size
