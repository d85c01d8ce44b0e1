"""Gathering without gloo's copy: the same bytes in the same places, from every rank, several gathers at once too."""

import deepspeed
import pytest
import torch
import torch.distributed as dist
from training_runs import RankPool, rank_pool

from minimind import cpu_gather
from minimind.cpu_gather import gather_in_place
from minimind.distributed import process_group, read_environment

RANKS = 3


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(RANKS)


def gather(dtype: torch.dtype, smallest: int, in_place: bool, async_op: bool) -> tuple[bool, int]:
    """On every rank: whether three gathers at once gave what all_gather_into_tensor gives, and how many broadcasts."""
    cpu_gather._SMALLEST_PART = smallest
    count, broadcast = 0, dist.broadcast

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return broadcast(*args, **kwargs)

    with process_group(read_environment(), torch.device("cpu")):
        rank, right, works = dist.get_rank(), [], []
        dist.broadcast = counted
        try:
            for number in range(3):
                own = (torch.arange(1000) * (rank + 1) + number).to(dtype)
                wanted, found = torch.zeros(RANKS * 1000, dtype=dtype), torch.zeros(RANKS * 1000, dtype=dtype)
                dist.all_gather_into_tensor(wanted, own)
                if in_place:
                    part = found[rank * 1000 : (rank + 1) * 1000]
                    part.copy_(own)
                    own = part
                works.append(gather_in_place(output_tensor=found, input_tensor=own, async_op=async_op))
                right.append((found, wanted))
            for work in works:
                assert (work is not None) == async_op
                if work is not None:
                    work.wait()
                    assert work.is_completed()
        finally:
            dist.broadcast = broadcast
    return all(torch.equal(found, wanted) for found, wanted in right), count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("async_op", [False, True], ids=["", "async"])
def test_large_parts_are_broadcast_where_they_belong(pool: RankPool, dtype, in_place, async_op):
    assert pool.run(gather, dtype, 1, in_place, async_op) == [(True, 3 * RANKS)] * RANKS


def test_small_parts_go_as_before(pool: RankPool):
    assert pool.run(gather, torch.float32, 4001, False, True) == [(True, 0)] * RANKS
    assert pool.run(gather, torch.float32, 4000, False, True) == [(True, 3 * RANKS)] * RANKS


def gather_by_deepspeed() -> bool:
    with process_group(read_environment(), torch.device("cpu")):
        return deepspeed.comm.comm.cdb.all_gather_function is gather_in_place


def test_deepspeed_gathers_by_it_on_a_cpu(pool: RankPool):
    assert pool.run(gather_by_deepspeed) == [True] * RANKS
