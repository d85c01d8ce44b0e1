"""The few collectives that the project uses, and rank 0's log.

gloo's own all-reduce and all-gather pass a ring of all ranks, one hop after the other: hundreds of milliseconds at
4,096 ranks. What is small and on the host goes over trees here, in about log2(ranks) hops.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed

from minimind.distributed.environment import read_environment
from minimind.distributed.share import AT_ONCE, Share, share_among_threads
from minimind.errors import UserError

T = TypeVar("T")


def all_reduce_sum(tensor: torch.Tensor, group: torch.distributed.ProcessGroup | None = None) -> torch.Tensor:
    """Sum `tensor` over all ranks, or those of a group, in place. Every rank calls this.

    A rank alone has the sum already, and its device may have no collectives (Apple's).
    """
    if torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank. Every rank calls this."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce_ints(values: Sequence[int], combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[int]:
    """Element-wise `combine` (`torch.add`, `torch.maximum`) of every rank's `values`, on host memory, so the device
    keeps working. Every rank calls this.

    Recursive doubling (Thakur, Rabenseifner and Gropp 2005): log2(ranks) exchanges, two more where the number of ranks
    is no power of two.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole = 1 << size.bit_length() - 1
    found, other = torch.tensor(values, dtype=torch.int64), torch.empty(len(values), dtype=torch.int64)
    if rank >= whole:
        torch.distributed.send(found, rank - whole)
        torch.distributed.recv(found, rank - whole)
        return found.tolist()
    if rank + whole < size:
        torch.distributed.recv(other, rank + whole)
        found = combine(found, other)
    distance = 1
    while distance < whole:
        sent = torch.distributed.isend(found, rank ^ distance)
        torch.distributed.recv(other, rank ^ distance)
        assert sent is not None
        sent.wait()
        found = combine(found, other)
        distance *= 2
    if rank + whole < size:
        torch.distributed.send(found, rank + whole)
    return found.tolist()


def gather_on_first(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on rank 0; part of them elsewhere. Every rank calls this."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    values, distance = [value], 1
    while distance < size:
        if rank % (2 * distance):
            torch.distributed.send_object_list([values], rank - distance)
            break
        if rank + distance < size:
            box: list[Any] = [None]
            torch.distributed.recv_object_list(box, rank + distance)
            values += box[0]
        distance *= 2
    return values


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. Every rank calls this."""
    return broadcast_object(gather_on_first(value))


def log(message: str) -> None:
    """Print one line on rank 0, and nothing on the other ranks."""
    initialized = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if initialized else read_environment().rank
    if rank == 0:
        print(message, file=sys.stdout, flush=True)


def on_first_rank(work: Callable[[], T]) -> T:
    """Do `work` on rank 0; its result, or its `UserError`, is every rank's. Every rank calls this."""
    return lead_from_first_rank(lambda share: work())


def lead_from_first_rank(work: Callable[[Share], T], before_share: Callable[[], None] = lambda: None) -> T:
    """`on_first_rank` with the help of all: every rank calls this.

    Where `work` calls the `Share` that it is given, all ranks help: with a few items a rank at a time, so that no
    collective waits for more than those. The function is sent by name, its items and results by value.

    Args:
        before_share: called on every rank before it does its part.
    """

    def help_with(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        before_share()
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        try:
            own: Any = share_among_threads(function, items[rank::size])
        except (UserError, OSError) as error:  # rank 0 must hear of it
            own = error
        parts = gather_on_first(own)
        if rank:
            return []
        for part in parts:
            if isinstance(part, Exception):
                raise part
        return [parts[number % size][number // size] for number in range(len(items))]

    def share(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        together = AT_ONCE * torch.distributed.get_world_size()
        found = []
        for start in range(0, len(items), together):
            some = items[start : start + together]
            broadcast_object(("share", (function, some)))
            found += help_with(function, some)
        return found

    if torch.distributed.get_rank() == 0:
        try:
            kind, value = broadcast_object(("done", work(share)))
        except UserError as error:
            kind, value = broadcast_object(("failed", str(error)))
    else:
        kind, value = broadcast_object(None)
        while kind == "share":
            help_with(*value)
            kind, value = broadcast_object(None)
    if kind == "failed":
        raise UserError(value)
    return value
