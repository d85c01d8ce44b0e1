"""All-gather of large tensors on CPU ranks, straight into the output, without gloo's temporary copy.

gloo gathers into a buffer of its own, new for every call (128 MB for minimind3 in bf16), whose pages the system has to
map first. And it copies from there in a thread of its own, for which torch makes an OpenMP team: once a process has
more team threads than cores, libgomp's threads sleep between two matmuls instead of spinning, for the rest of the run.
A broadcast writes straight into its output.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

# The largest part that torch still copies in one thread, in elements (at::internal::GRAIN_SIZE). From about there on
# several broadcasts take no longer than the copy (two and four ranks on one machine, parts of 16 KiB to 1 MiB).
_LARGEST_COPY = 2**15


def gather_in_place(
    output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
) -> "dist.Work | _Works | None":
    """`torch.distributed.all_gather_into_tensor`: every rank's (n,), in rank order, into (ranks * n,).

    Every rank of the group calls this. Large parts take one broadcast per rank, small ones gloo's gather, and a single
    rank a copy.
    """
    if not output_tensor.is_contiguous():
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
    if dist.get_world_size(group) == 1:
        if output_tensor.data_ptr() != input_tensor.data_ptr():
            output_tensor.view(-1).copy_(input_tensor.flatten())
        return _Works([]) if async_op else None
    if input_tensor.numel() <= _LARGEST_COPY:
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
    parts = output_tensor.view(dist.get_world_size(group), -1)
    own = parts[dist.get_rank(group)]
    if own.data_ptr() != input_tensor.data_ptr():
        own.copy_(input_tensor.flatten())
    works = [dist.broadcast(part, group=group, group_src=rank, async_op=True) for rank, part in enumerate(parts)]
    whole = _Works([work for work in works if work is not None])
    if async_op:
        return whole
    whole.wait()
    return None


class _Works:
    """Several pending operations, waited for as one."""

    def __init__(self, works: list[dist.Work]) -> None:
        self.works = works

    def wait(self, timeout: Any = None) -> bool:
        """Wait until all are done; whether all went well."""
        return all([work.wait() if timeout is None else work.wait(timeout) for work in self.works])

    def is_completed(self) -> bool:
        """Whether all are done."""
        return all(work.is_completed() for work in self.works)
