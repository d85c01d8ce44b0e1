"""Out of memory in one line: the rank, where it was, how much more it asked for, and what lowers the need.

Covers torch's allocators and Python's own; a process that the kernel kills leaves no error to explain.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence

import torch

from minimind.accelerator import device_module
from minimind.errors import OneRankError
from minimind.units import format_bytes

APPLE = "MPS backend out of memory"
"""A RuntimeError like any other."""


@contextlib.contextmanager
def explain_out_of_memory(
    device: torch.device, remedies: Sequence[str], who: str = "", position: Callable[[], str] | None = None
) -> Iterator[None]:
    """Turn a failed allocation in the block into one line.

    Args:
        device: where the block computes.
        remedies: what lowers the need, cheapest first.
        who: the rank, if there are several.
        position: where the run is, in words.

    Raises:
        OneRankError: the memory of the device, or of its host, is full.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_device = isinstance(error, torch.OutOfMemoryError) or APPLE in str(error)
        figures = []
        if more := re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE):
            figures.append(f"{_readable(more[1])} more were wanted")
        if on_device and device.type != "cpu":
            module = device_module(device)
            held, total = module.memory_allocated(device), module.mem_get_info(device)[1]
            figures.append(f"tensors hold {format_bytes(held)} of {format_bytes(total)}")
        line = f"{device if on_device else 'the host'} is out of memory"
        line += f" at {position()}" if position else ""
        line += f" ({', '.join(figures)})" if figures else ""
        raise OneRankError(f"{who and who + ': '}{line}: {'; '.join(remedies)}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: on a GPU, in its libraries, in torch's host allocator, or in Python."""
    # These have no error type of their own: torch raises a RuntimeError with their words.
    words = (
        "DefaultCPUAllocator",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
        "failure 'out of memory'",
        APPLE,
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def _readable(size: str) -> str:
    """torch's host allocator counts in bytes, the others in words such as "2.00 GiB"."""
    count = size.removesuffix("bytes").strip()
    return format_bytes(int(count)) if count.isdecimal() else size
