"""The few collectives that the project uses, and rank 0's log."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed

from minimind.distributed.environment import read_environment
from minimind.errors import UserError

T = TypeVar("T")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place. Every rank calls this."""
    torch.distributed.all_reduce(tensor)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank. Every rank calls this."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. Every rank calls this."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def log(message: str) -> None:
    """Print one line on rank 0, and nothing on the other ranks."""
    initialized = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if initialized else read_environment().rank
    if rank == 0:
        print(message, file=sys.stdout, flush=True)


def on_first_rank(work: Callable[[], T]) -> T:
    """Do `work` on rank 0; its result, or its `UserError`, is every rank's. Every rank calls this."""
    result: tuple[str, Any] | None = None
    if torch.distributed.get_rank() == 0:
        try:
            result = ("done", work())
        except UserError as error:
            result = ("failed", str(error))
    kind, value = broadcast_object(result)
    if kind == "failed":
        raise UserError(value)
    return value
