"""A full memory, said in one line: whose, how much more was wanted, and what lowers the need.

Knows the errors of torch's allocators and of Python; a process that the kernel kills says nothing, here or elsewhere.
Knows nothing of training (`out_of_memory` adds a run's place and flags).
"""

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch

from minimind.errors import OneRankError
from minimind.units import format_bytes


@contextlib.contextmanager
def full_memory_named(device: torch.device, cures: Sequence[str], who: str = "") -> Iterator[None]:
    """Turn an allocation that failed in the block into one line.

    Args:
        device: where the block computes.
        cures: what lowers the need, the cheapest first.
        who: the rank, where there are several.

    Raises:
        OneRankError: the memory of the device, or of its host, is full.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        raise OneRankError(describe(error, device, cures, who=who)) from error


def is_full_memory(error: Exception) -> bool:
    """Whether an allocation failed: on a GPU, in torch's allocator of the host, or in Python."""
    # torch has no type of its own for the host: its allocator raises a RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def describe(error: Exception, device: torch.device, cures: Sequence[str], *, who: str = "", place: str = "") -> str:
    """The line: who, where, at which place, figures, cures."""
    on_device = isinstance(error, torch.OutOfMemoryError)
    figures = []
    if wanted := re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE):
        figures.append(f"{_readable(wanted[1])} more were wanted")
    if on_device and device.type == "cuda":
        held, total = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[1]
        figures.append(f"tensors hold {format_bytes(held)} of {format_bytes(total)}")
    said = f" ({', '.join(figures)})" if figures else ""
    where = str(device) if on_device else "the host"
    return f"{who and who + ': '}{where} is out of memory{place and ' at ' + place}{said}: {'; '.join(cures)}"


def _readable(size: str) -> str:
    """The host's allocator counts bytes."""
    count = size.removesuffix("bytes").strip()
    return format_bytes(int(count)) if count.isdecimal() else size
