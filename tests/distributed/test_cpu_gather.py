"""Gathering without gloo's copy: the same bytes in the same places, from every rank, several gathers at once too, and
without the teams of threads that gloo would found."""

from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from training_runs import RankPool, rank_pool

from minimind.distributed.cpu_gather import gather_in_place
from minimind.distributed.environment import read_environment
from minimind.distributed.process_group import process_group

RANKS = 3
SMALL, LARGE = 2**15, 2**15 + 1
"""The largest part that gloo copies without a team of threads, and the smallest that needs one."""


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(RANKS)


def gather(dtype: torch.dtype, size: int, in_place: bool, async_op: bool) -> bool:
    """On every rank: whether three gathers at once gave what all_gather_into_tensor gives."""
    with process_group(read_environment(), torch.device("cpu")):
        rank, right, works = dist.get_rank(), [], []
        for number in range(3):
            own = (torch.arange(size) * (rank + 1) + number).to(dtype)
            wanted, found = torch.zeros(RANKS * size, dtype=dtype), torch.zeros(RANKS * size, dtype=dtype)
            dist.all_gather_into_tensor(wanted, own)
            if in_place:
                part = found[rank * size : (rank + 1) * size]
                part.copy_(own)
                own = part
            works.append(gather_in_place(output_tensor=found, input_tensor=own, async_op=async_op))
            right.append((found, wanted))
        for work in works:
            assert (work is not None) == async_op
            if work is not None:
                work.wait()
                assert work.is_completed()
    return all(torch.equal(found, wanted) for found, wanted in right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("async_op", [False, True], ids=["", "async"])
def test_large_parts_arrive_where_they_belong(pool: RankPool, dtype, in_place, async_op):
    assert pool.run(gather, dtype, LARGE, in_place, async_op) == [True] * RANKS


@pytest.mark.parametrize("async_op", [False, True], ids=["", "async"])
def test_small_parts_arrive_where_they_belong(pool: RankPool, async_op):
    assert pool.run(gather, torch.float32, SMALL, False, async_op) == [True] * RANKS


@pytest.fixture(scope="module")
def single():
    yield from rank_pool(1)


def gather_alone(async_op: bool) -> tuple[bool, bool]:
    """Whether one rank's gather gave its own part, and whether there was something to wait for."""
    own, found = torch.arange(1000.0), torch.zeros(1000)
    with process_group(read_environment(), torch.device("cpu")):
        work = gather_in_place(found, own, async_op=async_op)
        if work is not None:
            work.wait()
            assert work.is_completed()
        gather_in_place(own, own)
    return torch.equal(own, torch.arange(1000.0)) and torch.equal(own, found), work is not None


def test_one_rank_copies(single: RankPool):
    assert single.run(gather_alone, False) == [(True, False)]
    assert single.run(gather_alone, True) == [(True, True)]


def threads_founded(elements: int) -> tuple[int, int]:
    """How many threads ten gathers of parts added, and after them ten of gloo's. Products have two meanwhile."""

    def count() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with process_group(read_environment(), torch.device("cpu")):
            own = torch.ones(elements)
            whole = torch.zeros(dist.get_world_size() * elements)
            own.clone().add_(whole[:elements])  # this thread's own team
            counts = [count()]
            for gathered in (gather_in_place, dist.all_gather_into_tensor):
                for _ in range(10):
                    gathered(whole, own)
                counts.append(count())
    finally:
        torch.set_num_threads(before)
    return counts[1] - counts[0], counts[2] - counts[1]


@pytest.mark.parametrize("pool_name", ["single", "pool"])
def test_gloo_founds_no_teams_of_threads(pool_name: str, request: pytest.FixtureRequest):
    ranks: RankPool = request.getfixturevalue(pool_name)
    assert set(ranks.run(threads_founded, SMALL)) == {(0, 0)}
    found = ranks.run(threads_founded, LARGE)
    assert {ours for ours, _ in found} == {0}
    assert all(by_gloo > 0 for _, by_gloo in found)


def gather_by_deepspeed() -> bool:
    with process_group(read_environment(), torch.device("cpu")):
        dist.barrier()  # rank 0 holds the store: it must not leave before the others came
        return deepspeed.comm.comm.cdb.all_gather_function is gather_in_place


def test_deepspeed_gathers_by_it_on_a_cpu(pool: RankPool):
    assert pool.run(gather_by_deepspeed) == [True] * RANKS
